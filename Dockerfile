# docker build -t psn-train .
# docker run --gpus all --ipc=host -v "$PWD/data:/data" -v "$PWD/runs:/runs" psn-train train RECIPE data.train=/data/...
# More than one GPU: docker run ... --entrypoint accelerate psn-train launch --num_processes 8 -m psn_train.train RECIPE
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

RUN apt-get update \
 && apt-get install -y --no-install-recommends python3 python3-venv python3-dev g++ \
 && rm -rf /var/lib/apt/lists/*

# torch's wheels bring their own CUDA libraries; the base image brings what finds the driver
ENV VIRTUAL_ENV=/opt/venv PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
COPY requirements.lock /opt/psn_train/
RUN python3 -m venv /opt/venv \
 && pip install --no-cache-dir uv \
 && uv pip install --no-cache -r /opt/psn_train/requirements.lock

COPY pyproject.toml README.md LICENSE /opt/psn_train/
COPY psn_train /opt/psn_train/psn_train
COPY recipes /opt/psn_train/recipes
RUN uv pip install --no-cache --no-deps /opt/psn_train

# shared folders keep the owner of who starts the container: docker run --user "$(id -u):$(id -g)"
RUN useradd --create-home --uid 10001 psn && mkdir -p /data /runs && chown psn /runs
USER psn
WORKDIR /home/psn
ENTRYPOINT ["psn"]
CMD ["doctor"]
