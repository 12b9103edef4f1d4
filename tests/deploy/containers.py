"""Buildah and podman with separate storage, so that this machine's is not touched."""

import os
import shutil
import subprocess

from chart import ROOT

CONTAINERS_CONF = """
[containers]
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


class Podman:
    """Podman and buildah. Call `remove` to clean up."""

    def __init__(self, directory):
        self.directory = directory
        (directory / "containers.conf").write_text(CONTAINERS_CONF)
        self.env = {
            "PATH": os.environ["PATH"],
            "CONTAINERS_CONF": str(directory / "containers.conf"),
            "TMPDIR": str(directory),
        }
        self.storage = ["--root", directory / "storage", "--runroot", directory / "run", "--storage-driver", "vfs"]

    def run(self, program, *args, check=True, cwd=None):
        """Runs it and returns its output. Raises on failure, unless `check` is off."""
        done = subprocess.run(
            [program, *map(str, self.storage), *map(str, args)],
            capture_output=True,
            text=True,
            check=False,
            env=self.env,
            cwd=cwd or self.directory,
        )
        assert not check or done.returncode == 0, f"{program} {args}: {done.stderr}"
        return done.stdout.strip()

    def __call__(self, *args, **options):
        return self.run("podman", *args, **options)

    def remove(self):
        """Stops all containers."""
        self("pod", "rm", "--all", "--force", "--time", "0", check=False)
        self("rm", "--all", "--force", "--time", "0", check=False)

    def build(self, binary, name, *options):
        """The image of deploy/Dockerfile, with its first stage replaced by a directory, because a base image is not
        available everywhere. A binary that is not static comes with its libraries."""
        out = self.directory / f"built-{len(list(self.directory.glob('built-*')))}"
        root = out / "out"
        (root / "etc/ssl/certs").mkdir(parents=True)
        shutil.copy(binary, root / "tidegate")
        shutil.copy("/etc/ssl/certs/ca-certificates.crt", root / "etc/ssl/certs")
        for library in libraries(binary):
            target = root / library.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.realpath(library), target)
        empty = self.directory / "context"
        empty.mkdir(exist_ok=True)
        self.run(
            "buildah",
            "bud",
            "--isolation",
            "chroot",
            "--quiet",
            "--format",
            "docker",
            "--build-context",
            f"build={out}",
            "--file",
            ROOT / "deploy" / "Dockerfile",
            "--tag",
            name,
            *options,
            empty,
        )


def libraries(binary):
    """The libraries that its loader needs; none for a static binary."""
    linked = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
    return [word for word in linked.split() if word.startswith("/")]
