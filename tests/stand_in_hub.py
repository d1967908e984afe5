"""A stand-in for the Hugging Face hub: as much of its API as fetching and uploading models needs.

Every file goes up in the commit itself, which the real hub wants of small files only.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading
import urllib.parse

COMMIT = "a" * 40
TOKEN = "hf_stand_in"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, status, body=b"", **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/\w+)?", path):
            files = self.server.repositories.get(found[1])
            if files is None:
                self.reply(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            self.reply(200, {"id": found[1], "sha": COMMIT, "siblings": siblings})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/\w+", path):
            files = self.server.repositories[found[1]]
            entries = [
                {"type": "file", "path": name, "size": len(text), "oid": "b" * 40}
                for name, text in files.items()
            ]
            self.reply(200, entries)
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/\w+/(.+)", path):
            text = self.server.repositories[found[1]].get(found[2])
            if text is None:
                self.reply(404, b"", X_Error_Code="EntryNotFound")
                return
            self.server.fetched.append(found[2])
            etag = f'"{hashlib.sha1(text).hexdigest()}"'
            self.reply(200, text, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="none")
        else:
            self.reply(404, {"error": f"the stand-in has no {path}"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid username or password."})
            return
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.server.private[name] = asked.get("private") or asked.get("visibility") == "private"
            self.server.repositories.setdefault(name, {})
            self.reply(200, {"url": f"{self.server.url}/{name}", "name": name})
        elif path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.reply(200, {"files": modes})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            for line in body.splitlines():
                if (change := json.loads(line))["key"] == "file":
                    text = base64.b64decode(change["value"]["content"])
                    self.server.repositories[found[1]][change["value"]["path"]] = text
            self.reply(
                200, {"commitUrl": f"{self.server.url}/{found[1]}/commit/{COMMIT}",
                      "commitOid": COMMIT, "hookOutput": ""},
            )  # fmt: skip
        elif path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []})
        else:
            self.reply(404, {"error": f"the stand-in has no {path}"})


@contextlib.contextmanager
def stand_in_hub(repositories):
    """A server with these repositories: files by name, each a dictionary of bytes by path."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.url = f"http://127.0.0.1:{server.server_port}"
    server.repositories, server.private, server.fetched = repositories, {}, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
