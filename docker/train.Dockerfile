# Training, export and MLflow: the checkout with its locked environment. Not built here.
# --build-arg DEVICE=gpu takes CUDA and TensorRT along; the host then needs NVIDIA's container toolkit.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-eu", "-o", "pipefail", "-c"]
ARG DEVICE=cpu
WORKDIR /build
COPY docker/build.txt locks/${DEVICE}.txt ./
RUN python3 -m venv tools \
 && tools/bin/pip install --no-cache-dir --require-hashes -r build.txt \
 && python3 -m venv --without-pip /opt/chestct/.venv \
 && tools/bin/pip --python /opt/chestct/.venv/bin/python3 install --no-cache-dir --no-compile \
      --require-hashes -r "${DEVICE}.txt"
COPY client client
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./client \
 && tools/bin/pip --python /opt/chestct/.venv/bin/python3 install --no-cache-dir --no-deps \
      --no-compile wheels/chestct-*.whl \
 && mkdir sbom \
 && tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o sbom/chestct-train.cdx.json \
      /opt/chestct/.venv/bin/python3

FROM ${PYTHON_IMAGE}
ARG VERSION=0.0.0
ARG COMMIT=unknown
ARG DEVICE=cpu
LABEL org.opencontainers.image.title="chestct-train" \
      org.opencontainers.image.description="Training, export and tracking of the chest-CT classifier. Not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
COPY --from=build /opt/chestct/.venv /opt/chestct/.venv
COPY --from=build /build/sbom /usr/share/sbom
COPY benchmarks /opt/chestct/benchmarks
COPY configs /opt/chestct/configs
COPY docker/mlflow.sh /opt/chestct/docker/
COPY export /opt/chestct/export
COPY serving /opt/chestct/serving
COPY training /opt/chestct/training
COPY dvc.yaml /opt/chestct/
# A named volume takes its owner from the folder that it covers.
RUN mkdir -p /work /var/lib/mlflow && chown 10001:10001 /work /var/lib/mlflow
ENV DEVICE=${DEVICE} PATH=/opt/chestct/.venv/bin:${PATH} PYTHONPATH=/opt/chestct PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 HOME=/tmp DVC_NO_ANALYTICS=true MLFLOW_DISABLE_TELEMETRY=true
# Data, results and the tracking store: mount a folder here that holds or gets data/ and results/.
WORKDIR /work
USER 10001:10001
VOLUME ["/work"]
# It runs one command and ends; the services that it can be have checks of their own.
HEALTHCHECK NONE
ENTRYPOINT ["python3", "-m"]
CMD ["training", "fit", "--config", "/opt/chestct/configs/train.yaml"]
