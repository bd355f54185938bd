"""`hivegrpo export`."""

import sys
from pathlib import Path


def launch(
    run: str | None,
    to: Path,
    revision: str,
    *,
    adapter: bool,
    dtype: str | None,
    license: str | None,
    evaluation: Path | None,
    push: str | None,
) -> None:
    """Write the export, print its folder, and push it if that is asked for. Errors as `export` and `push`."""
    from hivegrpo.cli.output import configure_logging
    from hivegrpo.peer.inference.evaluated import read_evaluation
    from hivegrpo.peer.inference.license import check_license

    configure_logging(verbose=False)
    # What can be wrong at once is found before a model is loaded.
    named = check_license(license) if license is not None else None
    measured = read_evaluation(evaluation) if evaluation is not None else None
    if push is not None:
        from huggingface_hub import HfApi

        from hivegrpo.peer.inference.push import require_login

        require_login(HfApi(), push)

    from hivegrpo.peer.inference.export import Options, export

    options = Options(adapter=adapter, dtype=dtype, license=named, evaluation=measured)
    print(export(run, to, revision, options))
    if push is not None:
        from hivegrpo.peer.inference.push import push as upload

        address = upload(HfApi(), to, push)
        print(f"Pushed to {address}, which only you can see until you change that there.", file=sys.stderr)
