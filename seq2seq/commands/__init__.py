"""What each command does, from a typed config to the last line it prints: a module and function for each."""
