"""Data and the Vega bundle as text inside a page: JSON, gzip, base64, which no text in them can break. Knows no page and no figure."""

import base64
import gzip
import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.resources import files
from numbers import Real
from typing import Any

from latentguard.caches import cache_dir

_SNIPPET = "window.latentguardVega = vegaEmbed;"  # all that the page's script asks of the bundle
SCRIPTS = ("start", "charts", "figures", "sheets", "commands", "replies", "filters", "go")


def packed(value: Any) -> str:
    """A value as JSON, gzipped, in base64: letters, digits, +, / and = alone."""
    return base64.b64encode(gzip.compress(json.dumps(_clean(value), allow_nan=False, separators=(",", ":")).encode(), mtime=0)).decode()


def vega() -> tuple[str, str]:
    """The gzipped bundle in base64 and the CSP source of what it unpacks to; kept by version in the cache, for making it takes seconds."""
    known = hashlib.sha256(_SNIPPET.encode()).hexdigest()[:8]
    path = cache_dir("pages", f"vega-{version('vl-convert-python')}-{known}.js.gz")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        partial.write_bytes(gzip.compress(_bundle(), mtime=0))
        partial.replace(path)
    bundle = path.read_bytes()
    return base64.b64encode(bundle).decode(), source(gzip.decompress(bundle))


def _bundle() -> bytes:
    """Made in a process of its own: what bundles it brings a JavaScript engine along, whose threads can abort the end of the one it is in."""
    code = f"import sys, vl_convert; sys.stdout.buffer.write(vl_convert.javascript_bundle({_SNIPPET!r}).encode())"
    return subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE).stdout


def source(script: bytes) -> str:
    """How a Content-Security-Policy names exactly this script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script).digest()).decode()}'"


def style() -> str:
    """The page's CSS."""
    return files("latentguard.pages").joinpath("page.css").read_text(encoding="utf-8")


def script() -> str:
    """The page's JavaScript, one function that runs at once."""
    folder = files("latentguard.pages").joinpath("script")
    parts = [folder.joinpath(f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    return '(() => {\n"use strict";\n' + "\n".join(parts) + "})();\n"


def _clean(value: Any) -> Any:
    """What JSON holds: numbers of NumPy as Python's, NaN and infinities as null, all else that it does not know as text."""
    if isinstance(value, Mapping):
        return {str(key): _clean(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(inner) for inner in value]
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    return str(value)
