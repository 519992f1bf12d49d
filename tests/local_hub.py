"""A Hugging Face Hub for tests: models and datasets in memory, served on this machine by the standard library.

    with LocalHub() as hub:
        run_python("from huggingface_hub import create_repo; create_repo('org/name')", hub)
        hub.repos["models/org/name"].read(".gitattributes")

It answers as the Hub does where `huggingface_hub`, `datasets`, `diffusers` and `transformers` look: commits with a
history, branches, small files in git and large ones in LFS, byte ranges, errors with the Hub's own codes. It has no
Xet storage, access rights, tags, pull requests, pages of results or parsed model cards. A request that it does not
know gets a 501 and is kept in `hub.unknown_requests`.
"""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from local_hub_repos import LFS_SUFFIXES, MAX_BYTES_IN_GIT, HubError, Repo, StoredFile


USER = "local-user"


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self):
        return json.loads(self.body)


@dataclass(frozen=True)
class Response:
    content: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)


class LocalHub:
    """Serve a Hub at `endpoint` while the context is open; `repos` maps `"models/org/name"` to its `Repo`."""

    def __init__(self):
        self.repos = {}
        self.lfs_objects = {}  # content by SHA-256, shared by all repositories
        self.unknown_requests = []
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), HTTPHandler)
        self.server.hub = self
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request):
        """Run the handler of the request's route; what it returns, if not a `Response`, is sent as JSON."""
        try:
            with self.lock:
                result = self.dispatch(request)
            return result if isinstance(result, Response) else json_response(result)
        except HubError as error:
            return json_response({"error": str(error), **error.details}, error.status, error.headers)

    def dispatch(self, request):
        for method, pattern, handle in ROUTES:
            match = pattern.fullmatch(request.path)
            if match is None or request.method != method:
                continue
            # A quoted slash belongs to a name ("refs%2Fpr%2F1"), so names are unquoted after the path is split.
            names = {group: unquote(value) for group, value in match.groupdict().items() if value is not None}
            if "repo_id" in names:
                names["repo"] = self.find_repo(f"{names.pop('kind', 'models')}/{names.pop('repo_id')}")
            return handle(self, request, **names)
        self.unknown_requests.append(f"{request.method} {request.path}")
        raise HubError(501, "NotImplemented", f"LocalHub has no route for {self.unknown_requests[-1]}")

    def find_repo(self, key):
        if key not in self.repos:
            raise HubError(404, "RepoNotFound", f"{key} does not exist")
        return self.repos[key]

    def whoami(self, request):
        access_token = {"displayName": "local", "role": "write"}
        return {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": access_token}}

    def validate_yaml(self, request):
        return {"errors": [], "warnings": []}

    def agent_harnesses(self, request):
        return {"standardEnvVars": [], "harnesses": {}}

    def create_repo(self, request):
        wanted = request.json()
        repo = Repo(wanted.get("type", "model") + "s", f"{wanted.get('organization') or USER}/{wanted['name']}")
        answer = {"name": repo.repo_id, "url": f"{self.endpoint}/{repo.page}"}
        if repo.key in self.repos:
            raise HubError(409, "Conflict", f"{repo.key} exists already", **answer)
        self.repos[repo.key] = repo
        return answer

    def describe_repo(self, request, repo, revision="main"):
        commit = repo.find(revision)
        about = {"_id": repo.key, "id": repo.repo_id, "author": repo.repo_id.split("/")[0], "sha": commit.sha}
        state = {"private": False, "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0}
        siblings = [{"rfilename": path, "size": len(stored.content)} for path, stored in sorted(commit.files.items())]
        return {**about, **state, "lastModified": commit.date, "siblings": siblings}

    def list_refs(self, request, repo):
        heads = [(name, f"refs/heads/{name}", sha) for name, sha in repo.branches.items()]
        branches = [{"name": name, "ref": ref, "targetCommit": sha} for name, ref, sha in heads]
        return {"branches": branches, "tags": [], "converts": []}

    def list_tree(self, request, repo, revision, folder=""):
        commit = repo.find(revision)
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        return [commit.describe(path) for path in commit.paths_in(folder, recursive=recursive)]

    def describe_paths(self, request, repo, revision):
        commit = repo.find(revision)
        wanted = parse_qs(request.body.decode()).get("paths", [])
        return [commit.describe(path) for path in wanted if path in commit.files or path in commit.folders]

    def create_branch(self, request, repo, branch):
        if branch in repo.branches:
            raise HubError(409, "Conflict", f"branch {branch} exists already")
        repo.branches[branch] = repo.find(request.json().get("startingPoint", "main")).sha
        return {}

    def preupload(self, request, repo, revision):
        """Say which files go to LFS, and the oid of those that exist: the client leaves out what has not changed."""
        stored_files = repo.find(revision).files
        answers = []
        for file in request.json()["files"]:
            in_lfs = file["path"].endswith(LFS_SUFFIXES) or file["size"] > MAX_BYTES_IN_GIT
            answer = {"path": file["path"], "uploadMode": "lfs" if in_lfs else "regular", "shouldIgnore": False}
            if file["path"] in stored_files:
                answer["oid"] = stored_files[file["path"]].etag
            answers.append(answer)
        return {"files": answers}

    def lfs_batch(self, request, repo):
        answers = []
        for file in request.json()["objects"]:
            answer = {"oid": file["oid"], "size": file["size"]}
            if file["oid"] not in self.lfs_objects:
                answer["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{file['oid']}"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def lfs_upload(self, request, oid):
        if hashlib.sha256(request.body).hexdigest() != oid:
            raise HubError(400, "BadRequest", f"the {len(request.body)} bytes received do not hash to {oid}")
        self.lfs_objects[oid] = request.body
        return Response()

    def commit(self, request, repo, revision):
        if revision not in repo.branches:
            raise HubError(404, "RevisionNotFound", f"{repo.repo_id} has no branch {revision}")
        if "create_pr" in request.query:
            raise HubError(501, "NotImplemented", "LocalHub has no pull requests")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        head = repo.find(revision)
        if header["value"].get("parentCommit", head.sha) != head.sha:
            raise HubError(412, "PreconditionFailed", f"{revision} has moved on to {head.sha}")
        files = dict(head.files)
        for operation in operations:
            self.apply_operation(files, operation["key"], **operation["value"])
        commit = repo.add_commit(revision, header["value"]["summary"], files)
        return {"commitOid": commit.sha, "commitUrl": f"{self.endpoint}/{repo.page}/commit/{commit.sha}"}

    def apply_operation(self, files, key, path, content=None, oid=None, **details):
        if key == "file":
            files[path] = StoredFile(base64.b64decode(content))
        elif key == "lfsFile":
            files[path] = StoredFile(self.lfs_objects[oid], in_lfs=True)
        elif key == "deletedFile" and path in files:
            del files[path]
        elif key == "deletedFolder":
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]
        else:
            raise HubError(400, "BadRequest", f"cannot apply {key} to {path}")

    def resolve(self, request, repo, revision, path):
        """Send a file, or the range of bytes that is asked for.

        The real Hub redirects to a storage host for a file in LFS. The client follows a redirect to the same host
        and would lose the headers of the first answer, so here every file is sent at once.
        """
        commit = repo.find(revision)
        stored = commit.file(path)
        size = len(stored.content)
        headers = {"ETag": f'"{stored.etag}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if byte_range is None:
            return Response(stored.content, headers=headers)
        first, last = int(byte_range[1]), min(int(byte_range[2] or size), size - 1)
        if first > last:
            raise HubError(416, "RangeNotSatisfiable", f"{path} has {size} bytes")
        return Response(
            stored.content[first : last + 1], 206, {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}
        )


API = "/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
PAGE = "/(?:(?P<kind>datasets)/)?(?P<repo_id>[^/]+/[^/]+)"
REVISION = "(?P<revision>[^/]+)"
ROUTES = [
    ("GET", re.compile("/api/whoami-v2"), LocalHub.whoami),
    ("POST", re.compile("/api/validate-yaml"), LocalHub.validate_yaml),
    ("GET", re.compile("/api/agent-harnesses"), LocalHub.agent_harnesses),
    ("POST", re.compile("/api/repos/create"), LocalHub.create_repo),
    ("GET", re.compile(f"{API}(?:/revision/{REVISION})?"), LocalHub.describe_repo),
    ("GET", re.compile(f"{API}/refs"), LocalHub.list_refs),
    ("GET", re.compile(f"{API}/tree/{REVISION}(?:/(?P<folder>.+))?"), LocalHub.list_tree),
    ("POST", re.compile(f"{API}/paths-info/{REVISION}"), LocalHub.describe_paths),
    ("POST", re.compile(f"{API}/branch/(?P<branch>[^/]+)"), LocalHub.create_branch),
    ("POST", re.compile(f"{API}/preupload/{REVISION}"), LocalHub.preupload),
    ("POST", re.compile(rf"{PAGE}\.git/info/lfs/objects/batch"), LocalHub.lfs_batch),
    ("PUT", re.compile("/lfs/(?P<oid>[0-9a-f]{64})"), LocalHub.lfs_upload),
    ("POST", re.compile(f"{API}/commit/{REVISION}"), LocalHub.commit),
    ("GET", re.compile(f"{PAGE}/resolve/{REVISION}/(?P<path>.+)"), LocalHub.resolve),
]


def json_response(value, status=200, headers=None):
    return Response(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})


class HTTPHandler(BaseHTTPRequestHandler):
    """The way between a socket and `LocalHub.answer`."""

    protocol_version = "HTTP/1.1"  # keeps connections open

    def handle_request(self):
        url = urlsplit(self.path)
        method = "GET" if self.command == "HEAD" else self.command
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        response = self.server.hub.answer(Request(method, url.path, parse_qs(url.query), self.headers, body))
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(len(response.content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def log_message(self, format, *arguments):
        """Keep quiet."""


def run_python(code_or_path, hub, *arguments, cwd=None, timeout=300):
    """Run code (`str`) or a script (`Path`) as a user of `hub` and return what it prints.

    It runs in an interpreter of its own, since `huggingface_hub` reads its settings on import, and with an empty
    cache, so that whatever it loads came from the hub, and on one thread, since the order of a sum depends on their
    number. `cwd` defaults to an empty folder; `timeout` is in seconds.
    """
    hub_settings = re.compile("(HF|HUGGINGFACE|TRANSFORMERS)_.*|.*_proxy", re.IGNORECASE)
    environment = {name: value for name, value in os.environ.items() if not hub_settings.fullmatch(name)}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "dummy", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        work_folder, script = Path(scratch, "work"), Path(scratch, "script.py")
        work_folder.mkdir()
        if isinstance(code_or_path, Path):
            script = code_or_path.resolve()
        else:
            script.write_text(textwrap.dedent(code_or_path), encoding="utf-8")
        process = subprocess.run(
            [sys.executable, script, *map(str, arguments)],
            cwd=cwd or work_folder,
            env={**environment, "HF_HOME": str(Path(scratch, "hf_home"))},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if process.returncode != 0:
        raise AssertionError(f"{script} exited with {process.returncode}\n{process.stdout}\n{process.stderr}")
    return process.stdout
