# The GPU image: torch as the base image brings it, DeepSpeed, megatron_tf.
#   docker build -t megatron_tf .                                  # with apex: --build-arg WITH_APEX=1 (half an hour)
#   docker run --gpus all --ipc=host -v "$PWD/data:/megatron_tf/data" -v "$PWD/runs:/megatron_tf/runs" -it megatron_tf
#   deepspeed launch/train.py configs/124M.yml                     # in it
# A -devel image: DeepSpeed's and apex's kernels need nvcc. --ipc=host: NCCL talks through shared memory.
ARG BASE=pytorch/pytorch:2.11.0-cuda12.8-cudnn9-devel
FROM ${BASE}

# The image is the isolation. The constraint keeps the base image's torch: pip would replace it by another CUDA build.
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_CONSTRAINT=/constraints.txt
RUN python3 -c "from importlib.metadata import version; print('torch==' + version('torch'))" > /constraints.txt \
    && python3 -m pip install "setuptools>=77" wheel ninja numpy packaging \
    && python3 -m pip install --no-build-isolation deepspeed==0.19.8

# From its source: apex on PyPI is another project. Without a GPU in sight at build time it builds for all it knows.
ARG WITH_APEX=0
ARG APEX_COMMIT=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN if [ "${WITH_APEX}" = 1 ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 APEX_PARALLEL_BUILD=4 python3 -m pip install --no-build-isolation \
            "https://github.com/NVIDIA/apex/archive/${APEX_COMMIT}.tar.gz"; \
    fi

WORKDIR /megatron_tf
COPY . .
RUN python3 -m pip install --no-build-isolation -e ".[plot,sentencepiece,tensorboard,wandb]"
CMD ["bash"]
