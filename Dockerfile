# oftsurgery on CPUs:
#   docker build -t oftsurgery .
#   docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" oftsurgery fold BASE ADAPTER OUTPUT
FROM python:3.11-slim

ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    # any user finds the compiled kernels here, and adds those of another CPU
    NUMBA_CACHE_DIR=/opt/numba-cache \
    HF_HOME=/tmp/huggingface

WORKDIR /src
COPY pyproject.toml constraints.txt README.md CHANGELOG.md LICENSE ./

# torch's build for CPUs comes first: PyPI's build brings gigabytes of CUDA
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN grep '^torch==' constraints.txt > torch.txt \
    && pip install --index-url "$TORCH_INDEX" --extra-index-url https://pypi.org/simple --requirement torch.txt

COPY oftsurgery oftsurgery
RUN pip install --constraint constraints.txt '.[gguf,onnx,parquet,peft,report]'

# numba compiles the kernels at the first fold, for the CPU of this machine; another kind of CPU compiles them again
COPY docker/warm_up.py ./
RUN python warm_up.py && chmod -R a+rwX "$NUMBA_CACHE_DIR"

WORKDIR /work
ENTRYPOINT ["oftsurgery"]
CMD ["--help"]
