# The image that kuberay.yaml runs: Ray's own, and this project at its pinned versions.
FROM rayproject/ray:2.60.0-py311-gpu

# /home/ray is the home folder in all of Ray's images.
RUN python -m venv /home/ray/venv
ENV PATH="/home/ray/venv/bin:$PATH"
WORKDIR /home/ray/project

# The environment first: it changes seldom, and its layer is kept.
COPY --chown=ray requirements.txt ./
RUN python -m pip install --no-cache-dir --require-hashes -r requirements.txt
COPY --chown=ray pyproject.toml README.md LICENSE ./
COPY --chown=ray scalenet_ray ./scalenet_ray
COPY --chown=ray jobs ./jobs
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation .
