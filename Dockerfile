# mpp with its tested versions, for NVIDIA GPUs: docs/platforms.md says how it is built and used
FROM nvidia/cuda:13.0.1-runtime-ubuntu24.04
ARG EXTRAS=prodigy,schedulefree,heic

# Ubuntu's archive keeps no older versions to name.
# hadolint ignore=DL3008
RUN apt-get update \
  && apt-get install -y --no-install-recommends python3.12 python3.12-venv \
  && rm -rf /var/lib/apt/lists/* \
  && python3.12 -m venv /opt/mpp
ENV PATH=/opt/mpp/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /src
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt torch
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY configs configs
COPY src src
RUN pip install --no-cache-dir -c constraints.txt ".[$EXTRAS]"

# Jobs, images and what comes out of them are mounted here; models that a hub gives are kept in it.
WORKDIR /work
RUN chown 1000:1000 /work
ENV HOME=/work USER=mpp
USER 1000:1000
ENTRYPOINT ["python", "-m"]
CMD ["mpp.run", "--help"]
