"""What `LocalHub` keeps: repositories with a history of commits, files in git or in LFS."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import PurePosixPath


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow", ".mp4", ".npz", ".tar", ".zip")
MAX_BYTES_IN_GIT = 10 * 1024 * 1024


class HubError(Exception):
    """An answer that is not a success; `huggingface_hub` chooses its exception by `code`, then by `status`."""

    def __init__(self, status, code, message, headers=None, **details):
        super().__init__(message)
        self.status, self.details = status, details
        header_message = message.encode("ascii", "replace").decode()  # headers hold no other letters
        self.headers = {"X-Error-Code": code, "X-Error-Message": header_message, **(headers or {})}


@dataclass(frozen=True)
class StoredFile:
    content: bytes
    in_lfs: bool = False

    @cached_property
    def sha256(self):
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def git_content(self):
        """What git itself holds: the content, or the pointer to it for a file in LFS."""
        if not self.in_lfs:
            return self.content
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode()

    @cached_property
    def git_oid(self):
        return hashlib.sha1(b"blob %d\0" % len(self.git_content) + self.git_content).hexdigest()

    @property
    def etag(self):
        return self.sha256 if self.in_lfs else self.git_oid

    def describe(self, path):
        entry = {"type": "file", "path": path, "oid": self.git_oid, "size": len(self.content)}
        if self.in_lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.git_content)}
        return entry


@dataclass(frozen=True)
class Commit:
    files: Mapping[str, StoredFile]
    title: str
    parent: str | None
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ"))

    @cached_property
    def sha(self):
        oids = sorted((path, stored.git_oid) for path, stored in self.files.items())
        return hashlib.sha1(json.dumps([self.parent, self.title, self.date, oids]).encode()).hexdigest()

    @cached_property
    def folders(self):
        return {str(folder) for path in self.files for folder in PurePosixPath(path).parents[:-1]}

    def missing(self, path):
        # The client keeps a note in its cache that this commit has no such path.
        return HubError(404, "EntryNotFound", f"{path} does not exist at {self.sha}", {"X-Repo-Commit": self.sha})

    def file(self, path):
        if path not in self.files:
            raise self.missing(path)
        return self.files[path]

    def describe(self, path):
        if path in self.folders:
            return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}
        return self.file(path).describe(path)

    def paths_in(self, folder, *, recursive):
        """List what is below `folder` (`""` is the root): everything, or its own files and folders only."""
        prefix = f"{folder}/" if folder else ""
        below = sorted(path for path in {*self.files, *self.folders} if path.startswith(prefix))
        if not below:
            raise self.missing(folder)
        return [path for path in below if recursive or "/" not in path.removeprefix(prefix)]


class Repo:
    """One repository: its commits by SHA, and the branches that name some of them."""

    def __init__(self, kind, repo_id):
        self.key = f"{kind}/{repo_id}"
        self.repo_id = repo_id
        self.page = f"datasets/{repo_id}" if kind == "datasets" else repo_id
        self.commits, self.branches = {}, {"main": None}
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.add_commit("main", "initial commit", {".gitattributes": StoredFile(attributes.encode())})

    def find(self, revision="main"):
        """Return the commit that a branch or a full SHA names."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise HubError(404, "RevisionNotFound", f"{self.repo_id} has no revision {revision}")
        return self.commits[sha]

    def read(self, path, revision="main"):
        return self.find(revision).file(path).content

    def add_commit(self, branch, title, files):
        commit = Commit(files, title, parent=self.branches[branch])
        self.commits[commit.sha] = commit
        self.branches[branch] = commit.sha
        return commit
