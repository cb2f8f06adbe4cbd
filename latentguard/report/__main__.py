"""`python -m latentguard.report FOLDER…`: the page of a run, of a sweep, or of several runs beside each other."""

import argparse
import json
import logging
import sys
from pathlib import Path

from latentguard.errors import InputError

EXAMPLES = """\
  python -m latentguard.report runs/2026-11-21_10-00-00_steer_harm_llama3      report.html and report.md in that folder
  python -m latentguard.report runs/2026-11-21_10-00-00_sweep                  the same for a sweep
  python -m latentguard.report runs/A runs/B                                   B against A: paired differences, in runs/compare_A_B/
  python -m latentguard.report --list                                          past runs with their headline numbers
  python -m latentguard.report runs/A --generations verdicts                   a page to pass on: without what the model said
  python -m latentguard.report runs/A --wandb --dry-run                        what the W&B report would hold, as JSON
"""


def main(words: list[str] | None = None) -> int:
    """Exit code 0, or 2 for bad input, said in one sentence."""
    parser = argparse.ArgumentParser(prog="python -m latentguard.report", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="a run's folder, a sweep's, or several runs'; with --list, where to look (runs)")
    parser.add_argument("--list", action="store_true", help="past runs, a line each")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the page goes; else the run's or the sweep's own folder")
    parser.add_argument("--generations", choices=("full", "verdicts"), default="full", help="verdicts keeps back what the model said")
    parser.add_argument("--wandb", action="store_true", help="a W&B report and workspace instead (pip install 'latentguard[report]')")
    parser.add_argument("--entity", help="with --wandb: whose; else the runs' own")
    parser.add_argument("--project", help="with --wandb: where; else the runs' own")
    parser.add_argument("--dry-run", action="store_true", help="with --wandb: write the specifications as JSON, ask no server")
    asked = parser.parse_args(words)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return run(asked)
    except InputError as error:
        print(f"latentguard: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"latentguard: {error.filename or 'a file'} cannot be read or written ({error.strerror}); name another folder, or --out", file=sys.stderr)
        return 2


def run(asked: argparse.Namespace) -> int:
    """What the words ask for."""
    if asked.list and (asked.wandb or asked.out):
        raise InputError("--list goes alone, or with folders to look in")
    if asked.list:
        from latentguard.report.listing import listing

        print("\n\n".join(listing(folder) for folder in asked.folders or ["runs"]))
        return 0
    if not asked.folders:
        raise InputError("name the folder of a run or a sweep, or several runs; --list names those under runs/")
    if not asked.wandb and (asked.dry_run or asked.entity or asked.project):
        raise InputError("--dry-run, --entity and --project go with --wandb")
    folders = [Path(folder) for folder in asked.folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise InputError(f"{asked.folders[-1]} is named twice: name each run once")
    from latentguard.report.page import write, write_report
    from latentguard.report.runs import read_runs

    full = asked.generations == "full"
    if len(folders) == 1 and not asked.wandb:
        page = write_report(folders[0], full=full, out=asked.out)
    else:
        from latentguard.report.comparison import comparison_page

        runs = [one for folder in folders for one in read_runs(folder)]
        where = asked.out or (folders[0] if len(folders) == 1 else _beside(folders))
        if asked.wandb:
            return _wandb(asked, runs, where)
        page = write(comparison_page(runs, where, full=full), where)
    print(f"{page} ({page.stat().st_size / 1e6:.1f} MB), and the same as {page.with_suffix('.md').name}")
    return 0


def _beside(folders: list[Path]) -> Path:
    """runs/compare_A_B beside the first of them."""
    name = "_".join(folder.resolve().name for folder in folders)
    return folders[0].resolve().parent / f"compare_{name[:120]}"


def _wandb(asked: argparse.Namespace, runs: list, where: Path) -> int:
    from latentguard.report import boards

    if not asked.dry_run:
        for url in boards.publish(runs, asked.entity, asked.project):
            print(url)
        return 0
    where.mkdir(parents=True, exist_ok=True)
    for name, spec in boards.build(runs, asked.entity, asked.project).items():
        path = where / f"wandb_{name}.json"
        path.write_text(json.dumps(spec, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
