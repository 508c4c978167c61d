# A translation server: models come from a folder of runs.
#
#   docker build --tag seq2seq .
#   docker run --publish 127.0.0.1:8000:8000 --volume "$PWD/outputs:/outputs:ro" seq2seq run=mine
#
# For a GPU: docker build --build-arg TORCH=https://download.pytorch.org/whl/cu128 …, and docker run --gpus all …
ARG PYTHON=3.12
FROM python:${PYTHON}-slim

# The index of torch's builds: for a CPU the wheel is a tenth as large as the default one.
ARG TORCH=https://download.pytorch.org/whl/cpu
COPY constraints.txt /source/
RUN pip install --no-cache-dir --constraint /source/constraints.txt torch --index-url ${TORCH}

COPY pyproject.toml README.md LICENSE /source/
COPY configs /source/configs
COPY seq2seq /source/seq2seq
RUN pip install --no-cache-dir '/source[serve,export]' && useradd --system --no-create-home seq2seq

USER seq2seq
EXPOSE 8000
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["seq2seq", "serve", "host=0.0.0.0", "outputs=/outputs"]
