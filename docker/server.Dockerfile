# NVIDIA's Triton with its onnxruntime and tensorrt backends, for a GPU. Not built here, not run on a GPU.
ARG TRITON_IMAGE=nvcr.io/nvidia/tritonserver:25.08-py3

FROM ${TRITON_IMAGE} AS build
SHELL ["/bin/bash", "-eu", "-o", "pipefail", "-c"]
# hadolint ignore=DL3002
USER 0
WORKDIR /build
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv \
 && rm -rf /var/lib/apt/lists/*
COPY docker/build.txt docker/server.txt ./
RUN python3 -m venv tools \
 && tools/bin/pip install --no-cache-dir --require-hashes -r build.txt \
 && python3 -m venv --without-pip /opt/chestct/python \
 && tools/bin/pip --python /opt/chestct/python/bin/python3 install --no-cache-dir --no-deps \
      --no-compile --require-hashes -r server.txt
COPY client client
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./client \
 && tools/bin/pip --python /opt/chestct/python/bin/python3 install --no-cache-dir --no-deps \
      --no-compile wheels/chestct-*.whl \
 && mkdir sbom \
 && tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o sbom/chestct-server.cdx.json \
      /opt/chestct/python/bin/python3

FROM ${TRITON_IMAGE}
ARG VERSION=0.0.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="chestct-server" \
      org.opencontainers.image.description="NVIDIA Triton on a GPU, for the chest-CT classifier. Not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
COPY --from=build /opt/chestct/python /opt/chestct/python
COPY --from=build /build/sbom /usr/share/sbom
COPY configs /opt/chestct/configs
COPY docker/server_start.py /opt/chestct/docker/
COPY export /opt/chestct/export
COPY training /opt/chestct/training
# A named volume takes its owner from the folder that it covers.
RUN mkdir -p /var/lib/chestct /var/cache/chestct/tensorrt \
 && chown 10001:10001 /var/lib/chestct /var/cache/chestct/tensorrt
# TF32 keeps ten bits of the FP32 head, and the TensorRT provider has no switch of its own for it.
ENV PATH=/opt/chestct/python/bin:/usr/src/tensorrt/bin:${PATH} PYTHONPATH=/opt/chestct \
    PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 NVIDIA_TF32_OVERRIDE=0 \
    CHESTCT_URL=grpc://127.0.0.1:8001 HOME=/tmp
WORKDIR /var/lib/chestct
USER 10001:10001
EXPOSE 8000 8001 8002
VOLUME ["/results", "/var/lib/chestct", "/var/cache/chestct/tensorrt"]
STOPSIGNAL SIGTERM
# The first start builds plans, which takes minutes.
HEALTHCHECK --interval=30s --timeout=20s --start-period=900s --retries=3 \
  CMD ["chestct", "health", "--timeout-s", "15", "--connect-timeout-s", "5"]
ENTRYPOINT ["/opt/chestct/python/bin/python3", "/opt/chestct/docker/server_start.py"]
CMD ["--http-address=0.0.0.0", "--grpc-address=0.0.0.0", "--metrics-address=0.0.0.0"]
