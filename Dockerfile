# One image for everything: data, training, sampling, evaluation. torch is the CUDA build of PyPI, which brings CUDA with it, so
# that the machine needs the NVIDIA driver and container toolkit only.
#
#     docker build -t grafting .
#     docker run --rm --gpus all --ipc host -v "$PWD:/work" grafting run my-recipe.yaml
#     docker run --rm --gpus all --ipc host -v "$PWD:/work" --entrypoint torchrun grafting \
#         --nproc-per-node 8 -m grafting run my-recipe.yaml
FROM python:3.11-slim-bookworm

# a compiler, for torch.compile
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --create-home --uid 1000 grafting \
    && install --directory --owner grafting /opt/grafting /work

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 \
    PATH=/opt/grafting/bin:$PATH \
    # nothing is sent anywhere unless asked: -e WANDB_MODE=online, -e HF_HUB_DISABLE_TELEMETRY=0
    WANDB_MODE=offline HF_HUB_DISABLE_TELEMETRY=1

USER grafting
RUN python -m venv /opt/grafting

# torch first: a change of the source does not download it again
COPY --chown=grafting requirements/ci.txt /opt/grafting/constraints.txt
RUN pip install torch -c /opt/grafting/constraints.txt

COPY --chown=grafting . /tmp/source
RUN pip install "/tmp/source[data,track,text]" -c /opt/grafting/constraints.txt \
    && rm -rf /tmp/source \
    && grafting --version

WORKDIR /work
ENTRYPOINT ["grafting"]
CMD ["--help"]
