"""A Hub on the loopback interface: just enough of its protocol for the real client to download and upload.

Repositories live in memory as lists of commits, a commit is a mapping of file names to bytes. The first
text in ``refuse`` makes the next request whose path contains it fail with 403, which the client does not
retry.
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<rev>[^/?]+)")
INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<rev>[^/?]+))?$")
FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<name>.+)")
PREUPLOAD = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<rev>[^/?]+)")
COMMIT = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<rev>[^/?]+)")
BRANCH = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/branch/(?P<rev>[^/?]+)")
BATCH = re.compile(r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")


class FakeHub:
    """Start with ``with FakeHub() as hub``; ``hub.url`` is the endpoint."""

    def __init__(self):
        self.repos = {}  # repo -> {branch: [(sha, {name: bytes})]}
        self.large = {}  # SHA-256 -> bytes
        self.log = []
        self.refuse = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(timeout=10)

    def commit(self, repo, branch, files):
        commits = self.repos.setdefault(repo, {}).setdefault(branch, [])
        before = commits[-1][1] if commits else {}
        sha = hashlib.sha1(f"{repo}{branch}{len(commits)}".encode()).hexdigest()
        commits.append((sha, {**before, **files}))
        return sha

    def find(self, repo, rev):
        branches = self.repos.get(repo, {})
        if branches.get(rev):
            return branches[rev][-1]
        return next((c for commits in branches.values() for c in commits if c[0] == rev), None)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, value=None, status=200, content=None, headers=None, head=False):
        body = content if content is not None else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if not head:
            self.wfile.write(body)

    def handle_any(self, method):
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        path = self.path.split("?")[0]
        self.hub.log.append(f"{method} {path}")
        if self.hub.refuse and self.hub.refuse[0] in path:
            self.hub.refuse.pop(0)
            return self.answer({"error": "refused by the test"}, 403)
        return getattr(self, method.lower())(path, body)

    def do_GET(self):
        self.handle_any("GET")

    def do_HEAD(self):
        self.handle_any("HEAD")

    def do_POST(self):
        self.handle_any("POST")

    def do_PUT(self):
        self.handle_any("PUT")

    def missing(self, code):
        self.answer({"error": code}, 404, headers={"X-Error-Code": code, "X-Error-Message": code})

    def head(self, path, body):
        self.get(path, body, head=True)

    def get(self, path, body, head=False):
        match = TREE.match(path) or FILE.match(path) or INFO.match(path)
        if match is None or match["repo"] not in self.hub.repos:
            return self.missing("RepoNotFound")
        found = self.hub.find(match["repo"], match["rev"] or "main")
        if found is None:
            return self.missing("RevisionNotFound")
        sha, files = found
        if match.re is INFO:
            return self.answer({"id": match["repo"], "sha": sha, "siblings": [], "tags": [], "private": False})
        if match.re is TREE:
            return self.answer([_tree_entry(name, content) for name, content in files.items()])
        content = files.get(match["name"])
        if content is None:
            return self.missing("EntryNotFound")
        tags = {"X-Repo-Commit": sha, "ETag": f'"{_blob_id(content)}"'}
        return self.answer(content=content, headers=tags, head=head)

    def post(self, path, body):
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.repos.setdefault(repo, {"main": []})
            return self.answer({"url": f"{self.hub.url}/{repo}"})
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if match := BRANCH.match(path):
            self.hub.repos[match["repo"]].setdefault(match["rev"], [])
            return self.answer({})
        if PREUPLOAD.match(path):
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(".safetensors") else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            return self.answer({"files": files})
        if BATCH.match(path):
            objects = json.loads(body)["objects"]
            return self.answer({"transfer": "basic", "objects": [self.upload(item) for item in objects]})
        if match := COMMIT.match(path):
            sha = self.hub.commit(match["repo"], match["rev"], self.files(body))
            url = f"{self.hub.url}/{match['repo']}/commit/{sha}"
            return self.answer({"commitUrl": url, "commitOid": sha})
        return self.missing("EntryNotFound")

    def put(self, path, body):
        self.hub.large[path.rpartition("/")[2]] = body
        self.answer({})

    def upload(self, item):
        return {**item, "actions": {"upload": {"href": f"{self.hub.url}/large/{item['oid']}"}}}

    def files(self, body):
        lines = [json.loads(line) for line in body.splitlines()]
        files = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        return files


def _blob_id(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _tree_entry(name, content):
    return {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
