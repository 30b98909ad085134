# The torch wheel brings its own CUDA libraries; the base image gives the OS and the hooks for the GPU driver.
ARG BASE_IMAGE=nvidia/cuda:11.8.0-base-ubuntu22.04
FROM ${BASE_IMAGE}

# APT_EXTRAS="g++ python3-dev" gives `compile` its compiler.
ARG APT_EXTRAS=
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates python3 python3-venv ${APT_EXTRAS} \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# The dependencies are their own layers, which stay cached until requirements.txt changes. For older cards and drivers,
# TORCH_INDEX_URL names another index to take torch (and only torch) from; requirements.txt gives its lower bound.
COPY requirements.txt /app/
ARG TORCH_INDEX_URL=
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --constraint /app/requirements.txt torch

# PIP_EXTRAS="bitsandbytes tensorboard" adds optional packages that requirements.txt names.
ARG PIP_EXTRAS=
RUN pip install --no-cache-dir --requirement /app/requirements.txt ${PIP_EXTRAS}

# Nothing runs as root, and any `--user` works: the folders can be written to by everybody, and libraries that ask for
# the user's name or home find them here. What they keep at home are caches, so it is /tmp, which is writable anyway.
RUN mkdir -p /data /output /models && chmod 1777 /data /output /models
ENV HOME=/tmp \
    USER=trainer \
    LOGNAME=trainer \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    LORA_HEALTH_PORT=8080

COPY train_lora.py config_schema.json example_config.json LICENSE /app/
COPY demo /app/demo
RUN chmod -R a+rX /app

USER 1000:1000
WORKDIR /data

# All that is ever written to: `--read-only` needs no more.
VOLUME ["/data", "/output", "/models", "/tmp"]

# Unhealthy: the run stands still, or its process does not answer. Without a port to ask, a living process is healthy.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD python -c "\
import http.client, os; \
address = os.environ.get('LORA_HEALTH_PORT') or exit(); \
health = http.client.HTTPConnection(address if ':' in address else '127.0.0.1:' + address, timeout=5); \
health.request('GET', '/health'); \
exit(health.getresponse().status != 200)"

# Exec form: the script is process 1 and gets the signals itself; `docker stop` ends in a saved run.
ENTRYPOINT ["python", "/app/train_lora.py"]
CMD ["--help"]

LABEL org.opencontainers.image.title="train_lora.py" \
      org.opencontainers.image.description="Trains a LoRA for Stable Diffusion 1.5, 2.1 or SDXL from a JSON config" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
