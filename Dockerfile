# `fastgpt serve` in a container; docs/deploying.md has the commands. For a CPU:
#   docker build --tag fastgpt .
# For a GPU (compute capability 8.0 or higher), with the kernels of its architecture:
#   docker build --tag fastgpt:cuda --build-arg BUILD=nvidia/cuda:13.0.2-devel-ubuntu24.04 \
#       --build-arg RUN=nvidia/cuda:13.0.2-base-ubuntu24.04 --build-arg KERNELS=1 --build-arg ARCHS=9.0 \
#       --build-arg PACKAGES='gcc libc6-dev python3-dev' .
ARG BUILD=ubuntu:24.04
ARG RUN=ubuntu:24.04

FROM ${BUILD} AS build
# KERNELS: 1 builds the CUDA kernels or fails, 0 leaves them out. ARCHS: compute capabilities, as in 8.0;9.0.
# TORCH: what pip installs; TORCH_OPTIONS: as in --index-url URL, for the builds of PyTorch without CUDA.
ARG KERNELS=0
ARG ARCHS=8.0;9.0
ARG TORCH="torch>=2.11"
ARG TORCH_OPTIONS=""
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/fastgpt \
    && /opt/fastgpt/bin/pip install --no-cache-dir ${TORCH_OPTIONS} "${TORCH}" \
    && /opt/fastgpt/bin/pip install --no-cache-dir numpy "setuptools>=77" ninja pybind11
COPY . /src
RUN cd /src \
    && FASTGPT_CUDA=${KERNELS} TORCH_CUDA_ARCH_LIST=${ARCHS} \
       /opt/fastgpt/bin/pip install --no-cache-dir --no-build-isolation '.[serve]'

FROM ${RUN}
# PACKAGES: Triton needs a C compiler and Python's headers where it first runs a kernel.
ARG PACKAGES=""
ENV DEBIAN_FRONTEND=noninteractive
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 10001 fastgpt
COPY --from=build /opt/fastgpt /opt/fastgpt
USER fastgpt
WORKDIR /home/fastgpt
ENV PATH=/opt/fastgpt/bin:$PATH PYTHONUNBUFFERED=1
EXPOSE 8000
# as long as the engine loads the model, /ready does not answer
HEALTHCHECK --interval=10s --timeout=5s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=4)"]
ENTRYPOINT ["fastgpt", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/model"]
