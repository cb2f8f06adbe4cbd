"""`python -m latentguard.serve guard=FOLDER model=NAME [key=value …]`. Answers --help and mistakes without torch."""

import os
import sys

from latentguard.errors import InputError
from latentguard.serve.settings import settings_of, token_of, usage
from latentguard.weights import spec_of


def main(words: list[str] | None = None) -> int:
    """Exit code 0, 1 where it failed, 2 for bad input, 130 where it was interrupted before it served."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        print(usage(), end="")
        return 0
    try:
        settings = settings_of(words)
        token = token_of(settings)
        spec_of(settings.model, **settings.model_settings)  # a mistyped model is told here
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise InputError("the server is one process: start it without torchrun; model.device_map=auto spreads a model over several GPUs")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or torch's waiting threads take the processor from the requests
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            from latentguard.serve.server import serve
        except ModuleNotFoundError as error:
            if error.name not in ("fastapi", "starlette", "uvicorn", "h11", "prometheus_client"):
                raise
            raise InputError(f"the server needs {error.name}: pip install 'latentguard[serve]'") from None
        return serve(settings, token)
    except InputError as error:
        print(f"latentguard: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
