#!/usr/bin/env bash
# What: a download that was killed starts again from its first byte, although the hub offers ranges. Every call writes
#       to a temporary file with a name of its own, so no later call finds what came, and each killed one leaves its part
#       in the cache for good. Within one call a connection that breaks does continue.
# Versions: huggingface_hub 2.4.0 without hf_xet.
# Source: found while importing models by name; older versions resumed from <etag>.incomplete.
# Date: 2026-11-29. Exit code: 0 while it behaves like this, 1 once it does not.
# Output seen: ranges asked for after the kill: [None]; parts left in the cache: 1, of 20971520 bytes
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv
python=$work/venv/bin/python
"$python" -m pip install --quiet --no-compile --disable-pip-version-check huggingface_hub==2.4.0
cat > resume.py <<'PY'
import hashlib, os, subprocess, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

content, commit, ranges, slow = bytes(30 << 20), "a" * 40, [], threading.Event()

class Hub(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        if "/resolve/" not in self.path:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        asked = self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").split("-")[0]) if asked else 0
        self.send_response(206 if first else 200)
        for name, value in {"Content-Length": len(content) - first, "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
                            "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}.items():
            self.send_header(name, str(value))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        ranges.append(asked)
        if slow.is_set():  # most of the file, then nothing
            self.wfile.write(content[: 25 << 20])
            time.sleep(600)
        self.wfile.write(content[first:])

server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
server.daemon_threads = True
threading.Thread(target=server.serve_forever, daemon=True).start()
env = {**os.environ, "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": "home"}
env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
call = [sys.executable, "-c", "import huggingface_hub as h; h.hf_hub_download('a/b', 'f.bin', revision='%s')" % commit]
parts = lambda: [p.stat().st_size for p in Path("home").rglob("*.incomplete")]

slow.set()
first = subprocess.Popen(call, env=env)
for _ in range(300):
    if parts() and max(parts()) >= 20 << 20:
        break
    time.sleep(0.1)
first.kill()
first.wait()
slow.clear()
ranges.clear()
subprocess.run(call, env=env, check=True)
print("huggingface_hub", version("huggingface_hub"))
print("a download that was killed starts again from its first byte")
print(f"ranges asked for after the kill: {ranges}; parts left in the cache: {len(parts())}, of {max(parts())} bytes")
unchanged = ranges == [None] and len(parts()) == 1 and parts()[0] >= 20 << 20
print("unchanged" if unchanged else "CHANGED")
sys.exit(not unchanged)
PY
"$python" resume.py
