# Triton for a CPU: the real server from its wheel, with OpenVINO and ONNX Runtime; no TensorFlow.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-eu", "-o", "pipefail", "-c"]
WORKDIR /build
COPY docker/build.txt docker/edge.txt serving/requirements.txt ./
RUN python3 -m venv tools \
 && tools/bin/pip install --no-cache-dir --require-hashes -r build.txt \
 && python3 -m venv --without-pip /opt/chestct/triton \
 && tools/bin/pip --python /opt/chestct/triton/bin/python3 install --no-cache-dir --no-deps \
      --no-compile --require-hashes -r requirements.txt -r edge.txt
COPY client client
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./client \
 && tools/bin/pip --python /opt/chestct/triton/bin/python3 install --no-cache-dir --no-deps \
      --no-compile wheels/chestct-*.whl \
 && mkdir sbom \
 && tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o sbom/chestct-edge.cdx.json \
      /opt/chestct/triton/bin/python3 \
 && find /opt/chestct/triton -depth -type d -name tests -exec rm -r {} + \
 && rm -rf /opt/chestct/triton/lib/python3*/site-packages/openvino/{include,cmake} \
 && find /opt/chestct/triton -name 'triton_python_backend_stub' \
      ! -path "*/$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')/*" -delete

FROM ${PYTHON_IMAGE}
ARG VERSION=0.0.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="chestct-edge" \
      org.opencontainers.image.description="NVIDIA Triton on a CPU, for the chest-CT classifier. Not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
COPY --from=build /opt/chestct/triton /opt/chestct/triton
COPY --from=build /build/sbom /usr/share/sbom
COPY serving /opt/chestct/serving
# Nothing is written outside of /tmp, so that the root file system can be read-only.
ENV PATH=/opt/chestct/triton/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    CHESTCT_URL=grpc://127.0.0.1:8001 HOME=/tmp
WORKDIR /opt/chestct
USER 10001:10001
EXPOSE 8000 8001 8002
VOLUME ["/models"]
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=20s --start-period=120s --retries=3 \
  CMD ["chestct", "health", "--timeout-s", "15", "--connect-timeout-s", "5"]
# Inside the container all addresses are taken; which of them are reachable is for the network to say.
ENTRYPOINT ["python3", "-m", "serving", "local", "--environment", "/opt/chestct/triton", "--repository", "/models"]
CMD ["--model", "chestct", "--address", "0.0.0.0"]
