# The torch wheel brings its own CUDA libraries; the base image gives the OS and the hooks for the GPU driver.
ARG BASE_IMAGE=nvidia/cuda:11.8.0-base-ubuntu22.04
FROM ${BASE_IMAGE}

LABEL org.opencontainers.image.title="train_lora.py" \
      org.opencontainers.image.description="Trains a LoRA for Stable Diffusion 1.5, 2.1 or SDXL from a JSON config" \
      org.opencontainers.image.licenses="MIT"

RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# The dependencies are their own layer, which stays cached until requirements.txt changes. For older cards and drivers,
# TORCH_INDEX_URL names another index to take torch (and only torch) from; requirements.txt gives its lower bound.
ARG TORCH_INDEX_URL=
COPY requirements.txt /app/
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --constraint /app/requirements.txt torch \
    && pip install --no-cache-dir --requirement /app/requirements.txt

# Nothing runs as root. The folders can be written to by everybody, so that any `--user` works, also one without a
# name in /etc/passwd: libraries that ask for the user's name find it in the environment.
RUN useradd --uid 1000 --non-unique --create-home trainer \
    && mkdir -p /data /output /models \
    && chmod 1777 /home/trainer /data /output /models
ENV HOME=/home/trainer \
    USER=trainer \
    LOGNAME=trainer \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    TORCHINDUCTOR_CACHE_DIR=/tmp/torchinductor

COPY train_lora.py config_schema.json example_config.json /app/
COPY demo /app/demo
RUN chmod -R a+rX /app

USER 1000
WORKDIR /data
VOLUME ["/data", "/output", "/models"]

HEALTHCHECK --interval=60s --timeout=20s --start-period=20s CMD ["python", "/app/train_lora.py", "--version"]

# Exec form: the script is process 1 and gets the signals itself; `docker stop` ends in a saved run.
ENTRYPOINT ["python", "/app/train_lora.py"]
CMD ["--help"]
