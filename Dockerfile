# The torch wheel brings its own CUDA libraries. The base image adds the OS and the hooks for the GPU driver.
ARG BASE_IMAGE=nvidia/cuda:11.8.0-base-ubuntu22.04
FROM ${BASE_IMAGE}

# APT_EXTRAS="g++ python3-dev" installs the compiler that `compile` needs.
ARG APT_EXTRAS=
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates python3 python3-venv ${APT_EXTRAS} \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv

ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# The dependencies have layers of their own, which Docker rebuilds only when requirements.txt changes. Older cards and
# drivers need another build of torch: TORCH_INDEX_URL names the index for torch, and for torch only.
COPY requirements.txt /app/
ARG TORCH_INDEX_URL=
RUN pip install --no-cache-dir ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --constraint /app/requirements.txt torch

# PIP_EXTRAS="bitsandbytes tensorboard" adds optional packages from the list in requirements.txt.
ARG PIP_EXTRAS=
RUN pip install --no-cache-dir --requirement /app/requirements.txt ${PIP_EXTRAS}

# Nothing runs as root, and any `--user` works: every user may write to the folders, and libraries that ask for the
# user's name or home folder get an answer. Libraries keep only caches at home, so /tmp serves as home.
RUN mkdir -p /data /output /models && chmod 1777 /data /output /models
ENV HOME=/tmp \
    USER=trainer \
    LOGNAME=trainer \
    HF_HOME=/models \
    HF_HUB_DISABLE_TELEMETRY=1 \
    LORA_HEALTH_PORT=8080

COPY train_lora.py config_schema.json example_config.json LICENSE /app/
COPY docs/events.schema.json /app/docs/
COPY demo /app/demo
RUN chmod -R a+rX /app

USER 1000:1000
WORKDIR /data

# The trainer writes to these folders only, so `--read-only` works.
VOLUME ["/data", "/output", "/models", "/tmp"]

# The check fails when the run makes no progress or its process does not answer. Without a health port it passes.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s CMD python -c "\
import http.client, os; \
address = os.environ.get('LORA_HEALTH_PORT') or exit(); \
health = http.client.HTTPConnection(address if ':' in address else '127.0.0.1:' + address, timeout=5); \
health.request('GET', '/health'); \
exit(health.getresponse().status != 200)"

# In exec form the script is process 1 and gets the signals itself, so `docker stop` ends in a saved run.
ENTRYPOINT ["python", "/app/train_lora.py"]
CMD ["--help"]

LABEL org.opencontainers.image.title="train_lora.py" \
      org.opencontainers.image.description="Trains a LoRA for Stable Diffusion 1.5, 2.1 or SDXL from a JSON config" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="MIT"
