# syntax=docker/dockerfile:1
# docker build -t xtuner .       torch with CUDA
# docker build -t xtuner:cpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu .
FROM python:3.12-slim

ARG TORCH_INDEX=https://pypi.org/simple
# Extras of pyproject.toml; DeepSpeed compiles some operators and wants a CUDA toolkit for them.
ARG EXTRAS=quant,eval

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# A compiler for torch.compile.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential git \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/xtuner
COPY requirements/tested.txt requirements/tested.txt
# torch first: its layer stays while the code changes. Of 2.x and 2.x+cpu pip takes the latter.
# hadolint ignore=DL3013
RUN pip install --extra-index-url "$TORCH_INDEX" --constraint requirements/tested.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY xtuner xtuner
RUN pip install --constraint requirements/tested.txt --editable ".[$EXTRAS]"

WORKDIR /work
ENTRYPOINT ["xtuner"]
CMD ["--help"]
