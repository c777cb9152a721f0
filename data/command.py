"""The command `moa data`: shards of images or text, a tokenizer, token files; each prints what trains with it."""

from pathlib import Path
from typing import Any, get_args

from data.faults import OnBadSample
from data.image_sources import FOLDER_TRAITS, TRAITS
from data.sources import Bad
from data.token_writer import Written, train_tokenizer, write_tokens
from data.tokenizer import BYTES
from data.writers import write_image_shards, write_text_shards
from moa_lightning.parser import Parser


def data_command(argv: list[str]) -> None:
    """`images`, `text`, `tokenizer` or `tokens`, each with --help."""
    options = vars(_parser().parse_args(argv))
    kind = options.pop("kind")
    if kind == "text":
        bad = Bad(options.pop("on_bad_sample"))
        shards = write_text_shards(**options, bad=bad)
        _report_bad(bad)
        _report_shards("TextShards", shards, {})
    elif kind == "tokenizer":
        _report_tokenizer(train_tokenizer(**options), options["source"])
    elif kind == "tokens":
        _report_tokens(write_tokens(**options))
    else:
        shards = write_image_shards(**options)
        traits = TRAITS.get(options["source"], FOLDER_TRAITS)._asdict()
        if options["image_size"]:
            traits["image_size"] = options["image_size"]
        _report_shards("ImageShards", shards, traits)


def _parser() -> Parser:
    parser = Parser("moa data", description="Write WebDataset shards, tokenizers, token files.")
    kinds = parser.add_subparsers(dest="kind", required=True)
    images = kinds.add_parser("images", help="images and class numbers as WebDataset shards")
    text = kinds.add_parser("text", help="documents as WebDataset shards")
    tokenizer = kinds.add_parser("tokenizer", help="train a byte-level BPE")
    tokens = kinds.add_parser("tokens", help="documents as packed token files")
    images.add_argument("--source", required=True, help=f"{', '.join(TRAITS)}, or a folder of images")
    images.add_argument("--image_size", type=int, help="resize and crop to so many pixels (default: as they are)")
    images.add_argument("--root", help="folder of the local copy of a packaged set")
    _add_documents(text)
    for command, fraction in ((images, 0.15), (text, 0.05)):
        command.add_argument("--samples_per_shard", type=int, default=1000, help="samples in a shard (default: 1000)")
        command.add_argument("--split_seed", type=int, default=0, help="of split and order (default: 0)")
        _add_folder(command, fraction)
    _add_documents(tokenizer)
    tokenizer.add_argument(
        "--vocab_size", required=True, type=int, help="tokens, 256 bytes and an end of text included"
    )
    tokenizer.add_argument("--out", required=True, help="file to write; must not exist")
    _add_documents(tokens)
    tokens.add_argument("--tokenizer", default=BYTES, help="bytes (the default), a tokenizer.json or a meta.pkl")
    _add_folder(tokens, 0.05)
    return parser


def _add_folder(command: Parser, fraction: float) -> None:
    command.add_argument("--out", required=True, help="folder to write; must not exist or be empty")
    for split in ("val", "test"):
        help_ = f"share of the {split} split where the source has none (default: {fraction})"
        command.add_argument(f"--{split}_fraction", type=float, default=fraction, help=help_)


def _add_documents(command: Parser) -> None:
    kinds = "plain text, .txt.gz, .jsonl and .json (.gz, .zst), .parquet or .tar"
    command.add_argument("--source", required=True, nargs="+", help=f"stdlib, or files, folders and globs: {kinds}")
    command.add_argument("--text_field", default="text", help="JSON key or Parquet column of the text (default: text)")
    command.add_argument(
        "--on_bad_sample",
        default="raise",
        choices=get_args(OnBadSample),
        help="what a document does that cannot be read (default: raise)",
    )


def _report_shards(module: str, shards: dict[str, list[Path]], traits: dict[str, object]) -> None:
    """Print what was written and the options that train with it."""
    rows = [[split, str(len(paths)), _megabytes(paths)] for split, paths in shards.items()]
    options = [f"--data {module}"]
    options += [f"--data.{split} '{paths[0].parent / f'{split}-*.tar'}'" for split, paths in shards.items()]
    for name, value in traits.items():
        options.append(f"--data.{name} '{list(value)}'" if isinstance(value, tuple) else f"--data.{name} {value}")
    _print(("split", "shards", "MB"), rows, "train with: " + " ".join(options))


def _report_tokens(written: Written) -> None:
    rows = []
    for split, part in written.description["splits"].items():
        counts = [f"{part[name]:,}" for name in ("documents", "tokens", "bytes")]
        rows.append([split, *counts, f"{part['bytes'] / part['tokens']:.2f}"])
    _report_bad(written.bad)
    columns = ("split", "documents", "tokens", "bytes", "bytes/token")
    _print(columns, rows, f"train with: --data TokenFiles --data.source '{written.folder}'")


def _report_tokenizer(written: Written, source: list[str]) -> None:
    _report_bad(written.bad)
    names = " ".join(f"'{name}'" for name in source)
    size = f"{written.description['vocab_size']:,}"
    _print(
        (), [], f"{size} tokens; use with: moa data tokens --source {names} --tokenizer '{written.folder}' --out DIR"
    )


def _report_bad(bad: Bad) -> None:
    if bad.count:
        _print((), [], f"left out {bad.count} bad documents, the first: {'; '.join(bad.first)}")


def _megabytes(paths: list[Path]) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:.1f}"


def _print(columns: tuple[str, ...], rows: list[list[Any]], line: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if rows:
        table = Table(*columns)
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(line, soft_wrap=True, highlight=False, markup=False)
