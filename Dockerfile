# tokenrelay in a container: one image, and the command picks the process (serve, api, worker, pull).
#
#   docker build -t tokenrelay --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu .
#   docker build -t tokenrelay:cuda --build-arg VARIANT=cuda .
#   docker run --read-only --tmpfs /tmp --init --stop-timeout 75 -v tokenrelay:/var/lib/tokenrelay \
#       -p 127.0.0.1:8000:8000 tokenrelay
#
# Which torch: PyPI's wheel for x86 Linux is the CUDA build, some GB larger. It carries its own CUDA libraries, so one
# slim base serves both variants and the host adds only the driver. For a CPU image name PyTorch's CPU index as above;
# without it the image works all the same, only larger.

# Pinned to the patch release: a rebuild next year starts from the same Python and the same Debian.
ARG PYTHON_IMAGE=python:3.11.15-slim-bookworm

# ---- builder: has a compiler, is thrown away ----
FROM ${PYTHON_IMAGE} AS builder
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/*

# One folder to hand over. Its pip goes along: `tokenrelay pull` fetches known models from the package index with it.
RUN python -m venv /opt/tokenrelay
ENV PATH=/opt/tokenrelay/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

# torch before the sources: the largest layer by far, and the one that changes least.
ARG TORCH_VERSION=2.13.0
ARG TORCH_INDEX_URL=
RUN pip install ${TORCH_INDEX_URL:+--index-url "${TORCH_INDEX_URL}"} "torch==${TORCH_VERSION}"
# A CUDA image with a CPU torch would start nowhere: refuse to build it.
ARG VARIANT=cpu
RUN case "${VARIANT}" in \
      cpu) ;; \
      cuda) python -c "import torch; assert torch.version.cuda, 'this torch has no CUDA'" ;; \
      *) echo "VARIANT must be cpu or cuda, not '${VARIANT}'" >&2; exit 1 ;; \
    esac

WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY tokenrelay tokenrelay
# setup.py lets an installation go on without the native kernels; an image must not ship without them unnoticed.
RUN pip install . \
 && ls /opt/tokenrelay/lib/python3*/site-packages/tokenrelay/model/transformer/kernels/_native*.so

# ---- runtime: no compiler, nobody's root ----
FROM ${PYTHON_IMAGE}
ARG VARIANT=cpu
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.title="tokenrelay" \
      org.opencontainers.image.description="An LLM inference server whose streams survive the death of any process" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# The uid is a number so that Kubernetes' runAsNonRoot can check it. All that is ever written lies in the one folder.
RUN groupadd --gid 10001 tokenrelay \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/tokenrelay --shell /usr/sbin/nologin tokenrelay \
 && install -d -o 10001 -g 10001 -m 0750 \
      /var/lib/tokenrelay /var/lib/tokenrelay/cache /var/lib/tokenrelay/data
COPY --from=builder /opt/tokenrelay /opt/tokenrelay
COPY deploy/healthcheck.py /opt/tokenrelay/healthcheck.py

# HOME and HF_HOME: a library that insists on a dot folder finds it on the volume. The variant's name is the device's.
ENV PATH=/opt/tokenrelay/bin:${PATH} \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_CACHE_DIR=1 \
    HOME=/var/lib/tokenrelay \
    HF_HOME=/var/lib/tokenrelay/cache/huggingface \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    TOKENRELAY_HOST=0.0.0.0 \
    TOKENRELAY_DEVICE=${VARIANT} \
    TOKENRELAY_CACHE_DIR=/var/lib/tokenrelay/cache \
    TOKENRELAY_DATA_DIR=/var/lib/tokenrelay/data

USER 10001:10001
WORKDIR /var/lib/tokenrelay
VOLUME /var/lib/tokenrelay
EXPOSE 8000 8001
# Liveness, not readiness: a process that waits for its broker must not be killed for it.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "/opt/tokenrelay/healthcheck.py", "/livez"]
ENTRYPOINT ["tokenrelay"]
CMD ["serve"]
