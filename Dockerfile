# An image in which every goal of make runs; what is configured, prepared and trained is kept in volumes.
#
#   docker build -t kablate .
#   alias kablate='docker run --rm -it -v kablate-data:/kablate/data -v kablate-results:/kablate/test_matrix_results kablate'
#   kablate defconfig-gpt2-ra-ablation+tiny
#   kablate run
#
# For GPUs: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 to build, --gpus all to run. constraints.txt pins
# what the CPU needs; the CUDA libraries are those that this build of torch asks for.
ARG BASE=python:3.12-slim
FROM ${BASE}

# The compilers are torch.compile's: g++ on a CPU, and the C compiler for Triton on a GPU.
RUN apt-get update \
    && apt-get install -y --no-install-recommends make git g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /kablate
COPY requirements.txt constraints.txt ./
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
# torch alone from its index, which has other versions of what it needs than the pinned ones.
RUN pip install --no-cache-dir --disable-pip-version-check --no-deps --index-url "${TORCH_INDEX}" -c constraints.txt torch \
    && pip install --no-cache-dir --disable-pip-version-check -r requirements.txt -c constraints.txt

ARG UID=1000
RUN useradd --create-home --uid "${UID}" kablate \
    && mkdir -p data test_matrix_results \
    && chown -R kablate:kablate /kablate
COPY --chown=kablate:kablate . .
USER kablate

# Beside the results, so that a configuration outlives its container.
ENV KCONFIG_CONFIG=/kablate/test_matrix_results/.config
VOLUME ["/kablate/data", "/kablate/test_matrix_results"]

ENTRYPOINT ["make", "PYTHON=python"]
CMD ["help"]
