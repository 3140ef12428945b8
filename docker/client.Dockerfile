# The thin client: the page (by default), `chestct classify`, and the DICOM node `chestct listen`.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
SHELL ["/bin/bash", "-eu", "-o", "pipefail", "-c"]
WORKDIR /build
COPY docker/build.txt locks/client.txt ./
RUN python3 -m venv tools \
 && tools/bin/pip install --no-cache-dir --require-hashes -r build.txt \
 && python3 -m venv --without-pip /opt/chestct/client \
 && tools/bin/pip --python /opt/chestct/client/bin/python3 install --no-cache-dir --no-deps \
      --no-compile --require-hashes -r client.txt
COPY client client
RUN tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir wheels ./client \
 && tools/bin/pip --python /opt/chestct/client/bin/python3 install --no-cache-dir --no-deps \
      --no-compile wheels/chestct-*.whl \
 && mkdir sbom \
 && tools/bin/cyclonedx-py environment --output-reproducible --of JSON -o sbom/chestct-client.cdx.json \
      /opt/chestct/client/bin/python3

FROM ${PYTHON_IMAGE}
ARG VERSION=0.0.0
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="chestct-client" \
      org.opencontainers.image.description="Page, batch client and DICOM node of the chest-CT classifier. Not a medical device." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${COMMIT}"
COPY --from=build /opt/chestct/client /opt/chestct/client
COPY --from=build /build/sbom /usr/share/sbom
ENV PATH=/opt/chestct/client/bin:${PATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp
WORKDIR /scans
USER 10001:10001
EXPOSE 8080 11112
STOPSIGNAL SIGTERM
# One inference all the way: CHESTCT_URL names the server.
HEALTHCHECK --interval=30s --timeout=20s --start-period=60s --retries=3 \
  CMD ["chestct", "health", "--timeout-s", "15", "--connect-timeout-s", "5"]
ENTRYPOINT ["chestct"]
CMD ["web", "--host", "0.0.0.0", "--port", "8080"]
