"""``python -m idml search``: the images most like one, in a file that ``python -m idml embed`` wrote."""

from __future__ import annotations

import csv
import dataclasses
import math
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from idml.commands.embed import check_new_file
from idml.commands.options import ModelOptions, parse, stored_config
from idml.config import check_within, option
from idml.contact_sheet import MOST_NEIGHBOURS, MOST_ROWS, contact_sheet, pictures_in_memory, pictures_of_files
from idml.data.collection import trained_on
from idml.embedding_file import EmbeddingTable, read_table, written_whole
from idml.errors import UserError
from idml.index import EmbeddingIndex, IndexType
from idml.paths import missing
from idml.pictures import QUALITY, picture_format
from idml.runtime import seed_everything
from idml.search import Found, Queries, check_model, embed_queries, find, ism_settings, read_queries
from idml.trained import TrainedModel, load

PRINTED = 20
"""Queries whose neighbours are printed; of more, see --out."""

CSV_COLUMNS = (
    *("query", "query_label", "query_uncertainty", "p_other_class", "novelty", "rank", "path", "split", "label"),
    *("similarity", "log_introspective_dissimilarity", "uncertainty"),
)
"""Of ``--out``."""

DESCRIPTION = """The images most like a query, among those of a file that `python -m idml embed` wrote."""


@dataclasses.dataclass(kw_only=True, slots=True)
class SearchOptions(ModelOptions):
    """Options of ``search``."""

    index: str | None = option(None, "file that embed wrote", "-i")
    query: list[str] | None = option(None, "image, or folder of images; several may be given", "-q", kind="paths")
    k: int = option(10, "neighbours of each query", "-k")
    index_type: IndexType = option("exact", "exact, or an index of faiss: flat, hnsw or ivfpq; kept beside the file")
    ef_search: int | None = option(None, "of hnsw, nodes kept in view; default 128. More find more, and take longer")
    nprobe: int | None = option(None, "of ivfpq, lists looked into; default 32. More find more, and take longer")
    introspective: bool = option(False, "order the max(100, 10 k) nearest by the introspective similarity")
    out: str | None = option(None, "CSV file to write the results to", "-o")
    sheet: str | None = option(None, "picture (.png, .jpg, .webp, ...) to draw queries and their neighbours in")
    data_dir: str | None = option(None, "folder of the indexed images, where it has moved")
    skip_bad_images: bool = option(False, "leave queries of a folder out that cannot be decoded, and say how many")
    overwrite: bool = option(False, "replace --out and --sheet where they exist")


def search(arguments: Sequence[str]) -> None:
    """Run the command; see the module.

    Raises:
        UserError: bad options, no index, another model than that of the index, a query that is no image.
    """
    config = parse(SearchOptions, arguments, name="search", description=DESCRIPTION)
    if config is None:
        return
    path, given = _check(config)
    wanted = ["uncertainty_embedding"] if config.introspective else []
    table = read_table(path, wanted=[*wanted, "belief", "foreseen_loss", "coordinates"])
    if config.k > len(table):
        raise UserError(f"-k: expected at most {len(table)}, the number of images in {path}, got {config.k}")
    introspective = ism_settings(table, path) if config.introspective else None
    root = _root(config, table)
    queries = read_queries(given, table, root, skip_bad_images=config.skip_bad_images, workers=config.workers)
    _check_k(config, queries, table)
    model = _open_model(config, table, path)
    index = EmbeddingIndex(table.numbers["embedding"], config.index_type, table.about["fingerprint"])
    if said := index.open(path):
        print(said)
    embedded = embed_queries(
        model, queries, batch_size=config.batch_size, workers=min(config.workers, len(queries) // 64)
    )
    started = time.perf_counter()
    wide = {"ef_search": config.ef_search, "nprobe": config.nprobe}
    found = find(queries, embedded, table, index, model, k=config.k, introspective=introspective, **wide)
    seconds = time.perf_counter() - started
    _print(config, found)
    _say_more(found, model)
    print(f"searched {len(table)} images for {len(queries)} queries in {seconds:.2f} s ({config.index_type})")
    if config.out is not None:
        write_csv(Path(config.out), found)
        print(f"results: {config.out}")
    if config.sheet is not None:
        _draw(config, found, model, root)


def _check(config: SearchOptions) -> tuple[Path, list[str]]:
    """File and queries; UserError for options that cannot be, a warning for those without effect."""
    if config.index is None:
        raise UserError("--index is missing: a file that `python -m idml embed` wrote")
    if not config.query:
        raise UserError("--query is missing: an image, or a folder of images")
    check_within(config, {"k": (1, math.inf), "ef_search": (1, math.inf), "nprobe": (1, math.inf)})
    for name, value, kind in (("ef-search", config.ef_search, "hnsw"), ("nprobe", config.nprobe, "ivfpq")):
        if value is not None and config.index_type != kind:
            warnings.warn(f"--{name} has no effect without --index-type {kind}", UserWarning, stacklevel=2)
    if config.sheet is not None and not Path(config.sheet).is_dir():
        picture_format(Path(config.sheet), "--sheet")
    for name, file in (("--out", config.out), ("--sheet", config.sheet)):
        if file is not None:
            check_new_file(Path(file), name, overwrite=config.overwrite)
    return Path(config.index), config.query


def _root(config: SearchOptions, table: EmbeddingTable) -> Path | None:
    """The folder of the indexed images; None where they are no files."""
    if config.data_dir is not None and not Path(config.data_dir).is_dir():
        raise UserError(f"--data-dir: {missing(config.data_dir)}; expected that of the indexed images")
    stored = config.data_dir or table.about.get("data_dir")
    return None if stored is None else Path(stored)


def _check_k(config: SearchOptions, queries: Queries, table: EmbeddingTable) -> None:
    """Say which queries are in the index themselves; UserError where there are then not k others."""
    own = [name for name, at in zip(queries.names, queries.positions, strict=True) if at >= 0]
    if not own:
        return
    if config.k > len(table) - 1:
        raise UserError(
            f"-k: expected at most {len(table) - 1}, since {own[0]} is one of the {len(table)} images of the index "
            f"itself and is left out of its own results, got {config.k}"
        )
    which = own[0] if len(own) == 1 else f"{len(own)} of {len(queries)} queries"
    are = "is" if len(own) == 1 else "are"
    print(f"{which} {are} in the index, and left out of the own results")


def _open_model(config: SearchOptions, table: EmbeddingTable, path: Path) -> TrainedModel:
    """The model that the file was made with."""
    source = config.checkpoint or table.about.get("checkpoint")
    if source is None or (config.checkpoint is None and not Path(source).exists()):
        raise UserError(f"the model that {path} was made with is not at {source} any more: give it with --checkpoint")
    seed_everything(0, threads=config.threads)
    model = load(source, device=config.device, trust_module=config.trust_module)
    check_model(model, table, path)
    return model


def _print(config: SearchOptions, found: Found) -> None:
    """The results as tables, one for each query."""
    queries, table = found.queries, found.table
    for row in range(min(len(queries), PRINTED)):
        label = f" ({queries.labels[row]})" if queries.labels[row] else ""
        score = f": uncertainty {found.embedded.uncertainty[row]:.3g} = {table.about['score']}"
        doubt = "" if found.other_class is None else f", P(nearest is of another class) {found.other_class[row]:.3f}"
        new = "" if found.novelty is None else f", novelty {found.novelty[row]:.3f}"
        print(f"{queries.names[row]}{label}{'' if table.about['score'] == 'none' else score}{doubt}{new}")
        lines = _lines(found, row)
        widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
        for line in lines:
            cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
            print(("  " + "  ".join(cells)).rstrip())
    if len(queries) > PRINTED:
        rest = "" if config.out is not None else "; give --out results.csv for all"
        print(f"({len(queries) - PRINTED} more queries{rest})")


def _lines(found: Found, row: int) -> list[list[str]]:
    """Title and neighbours of a query."""
    table, introspective = found.table, found.introspective
    lines = [["rank", "similarity", "log(1 - introspective)", "uncertainty", "label", "path"]]
    for column, index in enumerate(found.indices[row]):
        similarity = f"{found.similarities[row, column]:.4f}"
        own = "" if introspective is None else f"{introspective[row, column]:.2f}"
        uncertainty = f"{table.numbers['uncertainty'][index]:.3g}"
        lines.append([str(column + 1), similarity, own, uncertainty, table.labels[index] or "-", table.paths[index]])
    return lines if introspective is not None else [[*line[:2], *line[3:]] for line in lines]


def _say_more(found: Found, model: TrainedModel) -> None:
    """How many nearest images are of their query's class, where that is known, and what the probabilities mean."""
    nearest = [found.table.labels[index] for index in found.indices[:, 0]]
    pairs = [(own, other) for own, other in zip(found.queries.labels, nearest, strict=True) if own and other]
    if len(pairs) > 1:
        right = sum(own == other for own, other in pairs)
        print(f"nearest image of the query's class: {right / len(pairs):.1%} of {len(pairs)} queries with labels")
    if found.other_class is not None:
        assert model.introspection is not None
        spec = model.introspection.spec
        state = f"calibrated on {spec.held_out} held-out images that searched one another"
        state = state if spec.calibrated else f"not calibrated: {spec.note}"
        print(f"P(nearest is of another class) was {state}")
    if found.novelty is not None:
        print("novelty: the share of the indexed images whose nearest other one is nearer than the query's nearest")


def write_csv(path: Path, found: Found) -> None:
    """One line for each query and neighbour; what is not known is empty."""
    queries, table = found.queries, found.table
    with written_whole(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for row, name in enumerate(queries.names):
            own = [name, queries.labels[row], found.embedded.uncertainty[row]]
            own += [None if values is None else values[row] for values in (found.other_class, found.novelty)]
            for column, index in enumerate(found.indices[row]):
                image = [table.paths[index], table.splits[index], table.labels[index], found.similarities[row, column]]
                image.append(None if found.introspective is None else found.introspective[row, column])
                line = [*own, column + 1, *image, table.numbers["uncertainty"][index]]
                writer.writerow(["" if cell is None or cell != cell else cell for cell in line])


def _draw(config: SearchOptions, found: Found, model: TrainedModel, root: Path | None) -> None:
    """The contact sheet."""
    assert config.sheet is not None
    pictures = (
        pictures_of_files(found.table, root)
        if root is not None
        else pictures_in_memory(found.table, trained_on(stored_config(model)))
    )
    sheet, kind = contact_sheet(found, pictures), picture_format(Path(config.sheet), "--sheet")
    with written_whole(Path(config.sheet)) as temporary:
        sheet.save(temporary, kind, **QUALITY.get(kind, {}))
    limits = []
    for most, count, what in ((MOST_ROWS, len(found.queries), "queries"), (MOST_NEIGHBOURS, config.k, "neighbours")):
        limits += [f"the first {most} {what}"] if count > most else []
    print(f"sheet: {config.sheet}{' (' + ', '.join(limits) + ')' if limits else ''}")
