from seq2seq.cli.main import main

main()
