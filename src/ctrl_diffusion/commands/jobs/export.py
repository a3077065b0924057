"""Export a run as a folder that diffusers loads without this package.

The folder has the prior's pipeline, `controls/NAME/` with each control, `pipeline.py` with copies of the files it
imports, and a model card; and `programs/` with LoRA files for the programs that were named, and a page on their use.
"""

import ast
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ...chain.schedule import VariancePreserving
from ...evaluate.verdict import gap_line
from ...prior import families
from ...prior.parts import is_plain, load_part
from ...prior.prior import pipeline_folder
from ...run import pipeline as controlled
from ...run.folder import RunFolder
from ...run.programs.chains import SAMPLERS
from ...run.programs.files import adapted_layers, write_files
from ...run.programs.table import PROGRAMS, chosen
from ...run.run import Run, find_run
from ...system.files import one_line, write_json, write_text
from ...system.folders import check_output, clear
from ...system.progress import DEFAULT, JobOptions

INDEX, WEIGHTS, OTHERS = "model_index.json", "diffusion_pytorch_model", "programs"
FILES = ("README.md", "*.py", "grid.png", controlled.CONTROLS, OTHERS, INDEX)


def export(folder: Path, out: Path, options: JobOptions = DEFAULT, programs: Sequence[str] = ()) -> None:
    """Write the finished run of a folder as a pipeline of diffusers, and LoRA files for other programs.

    `options` are trust and overwriting.
    """
    check_output(out, INDEX, options.overwrite)
    run, files = Run.load(folder, trust=options.trust), RunFolder(find_run(folder))
    config = run.config
    prior = pipeline_folder(config.prior)
    index = json.loads((prior / INDEX).read_text(encoding="utf-8"))
    family = families.FAMILIES[index["_class_name"]]
    if getattr(family, "__package__", "") != families.__name__:
        raise ValueError(f"{index['_class_name']} was added to FAMILIES: an exported folder would lack its code.")
    named = {name: index[name] for name in index if name in ("scheduler", *families.PARTS)}
    parts = {name: part for name, part in named.items() if isinstance(part, list) and part[0] is not None}
    able = chosen_programs(run, index["_class_name"], programs, options)
    clear(out, FILES)
    for name, part in parts.items():
        if is_plain(prior, name, part):
            copy_part(prior, out, name)
        else:  # its weights are of a variant, or have the prefixes of a wrapper
            load_part(prior, name, part)[0].save_pretrained(out / name)
    for name, control in run.policy.controls.items():
        control.save(out / controlled.CONTROLS / name)
    if able:
        write_programs(out / OTHERS, run, index["_class_name"], able, options)
    for name, text in sources().items():
        write_text(out / f"{name}.py", text)
    if (grid := files.picture("grid")).is_file():
        shutil.copy(grid, out / "grid.png")
    else:
        options.say(f"{folder} has no grid.png, and so the README of {out} has no picture")
    write_text(out / "README.md", model_card(files, run, index["_class_name"], able))
    chain = {"steps", "sigma_end", "time_power", "gamma", "guidance", "negative_prompt", "size", "unconditional"}
    about = {
        **parts,
        "_class_name": controlled.CLASS,
        "_diffusers_version": index.get("_diffusers_version"),
        "base": index["_class_name"],
        "flags": {name: value for name, value in index.items() if isinstance(value, bool)},
        "chain": {**config.model_dump(include=chain), "focus": config.grid_focus, "controls": run.names},
        "id2label": index.get("id2label"),
    }
    write_json(out / INDEX, about)  # last: it marks a complete folder


def chosen_programs(run: Run, base: str, names: Sequence[str], options: JobOptions) -> list[str]:
    """Return the programs that take the controls of a run; say which do not, or refuse (ValueError)."""
    if not names:
        return []
    chosen(names, base)  # a model that no program takes is the better reason
    able, lines = chosen(names, base, adapted_layers(run.policy.controls.values(), run.config.gamma))
    for line in lines:
        options.say(line)
    return able


def write_programs(folder: Path, run: Run, base: str, names: Sequence[str], options: JobOptions) -> None:
    """Write the LoRA files of a run for other programs, and the page that says how each takes them."""
    denoiser, controls = run.prior.denoiser, list(run.policy.controls.values())
    written = write_files(folder, controls, denoiser.network, denoiser.schedule, base, run.config.gamma, names)
    for files in written:
        if files.slider:
            options.say(
                f"{files.name}: its slider is a line between {files.ends[0]} and {files.ends[1]}; the levels lie up to "
                f"{files.deviation:.1%} of its length beside it"
            )
        if files.span and (everywhere := [PROGRAMS[name].title for name in names if not PROGRAMS[name].by_step]):
            options.say(
                f"{files.name} speaks on a part of the steps, and {', '.join(everywhere)} will apply it on all: see "
                '"every_step" of ctrl evaluate --as'
            )
    programs = {name: PROGRAMS[name] for name in names}
    samplers = {name: SAMPLERS[name] for name in names} if isinstance(denoiser.schedule, VariancePreserving) else {}
    text = page("programs.md", run=run, base=base, programs=programs, controls=written, samplers=samplers)
    write_text(folder / "README.md", text)


def copy_part(prior: Path, out: Path, name: str) -> None:
    """Copy a part of a pipeline into its folder; early pipelines have its files beside the index."""
    if (prior / name).is_dir():
        shutil.copytree(prior / name, out / name, dirs_exist_ok=True)
        return
    (out / name).mkdir(exist_ok=True)
    for pattern in ("scheduler_config.json",) if name == "scheduler" else ("config.json", f"{WEIGHTS}*"):
        for file in prior.glob(pattern):
            shutil.copy(file, out / name / file.name)


def push_to_hub(out: Path, name: str) -> None:
    """Upload an exported folder to OWNER/NAME on the hub, and create the repository if there is none."""
    from huggingface_hub import HfApi

    try:
        hub = HfApi()
        hub.create_repo(name, exist_ok=True)
        hub.upload_folder(repo_id=name, folder_path=out, commit_message="ctrl export")
    except Exception as error:  # a different exception for no network, no token or a name that is taken
        reason = one_line(error, 200)
        raise ValueError(f"{out} is written, but the hub does not take it as {name}: {reason}") from error


def sources() -> dict[str, str]:
    """Read the files of an exported folder: run/pipeline.py and all it imports of ours, by name."""
    texts, paths = {}, [Path(controlled.__file__)]
    for path in paths:
        name = path.parent.name if path.stem == "__init__" else path.stem
        texts[name], imported = flattened(path)
        paths += [other for other in imported if other not in paths]
    if len(texts) < len(paths):
        raise RuntimeError("two files of an exported folder would have one name.")
    pipeline = texts.pop("pipeline")
    named = "\n".join(f"from .{name} import __doc__ as _  # noqa: F401" for name in texts)
    # diffusers copies only those files beside a pipeline.py that it imports itself
    return texts | {"pipeline": f"{pipeline}\n\n# diffusers looks here for the files it has to copy\n{named}\n"}


def flattened(path: Path) -> tuple[str, list[Path]]:
    """Read a module's text with its relative imports from one folder, and the files it imports."""
    text, imported = path.read_text(encoding="utf-8"), []
    for node in ast.parse(text).body:
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        target = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
        names = [alias.name for alias in node.names]
        if target.with_suffix(".py").is_file():
            imported.append(target.with_suffix(".py"))
        elif all((target / f"{name}.py").is_file() for name in names):
            imported += [target / f"{name}.py" for name in names]
        else:
            imported.append(target / "__init__.py")
        package = "" if imported[-1].parent == target and imported[-1].stem != "__init__" else target.name
        source = ast.get_source_segment(text, node)
        text = text.replace(source, f"from .{package}{source[source.index(' import') :]}", 1)
    return text, imported


def model_card(files: RunFolder, run: Run, base: str, programs: Sequence[str]) -> str:
    """Render the model card."""
    metrics = files.read_metrics()
    classifiers = metrics["classifier"] if len(run.names) > 1 else {run.name: metrics["classifier"]}
    example = {name: control.values[-1] for name, control in run.policy.controls.items()}
    first = "" if run.prior.classes is None else f"class_labels={run.prior.class_names[0]!r}, "
    if run.prior.text:
        first = f"{run.prior.class_names[0]!r}, "
    return page(
        "card.md", run=run, base=base, metrics=metrics, classifiers=classifiers, controls=run.policy.controls,
        call=f"{first}controls={example}", certified=gap_line(metrics["certificate"]),
        programs=", ".join(PROGRAMS[name].title for name in programs), has_grid=files.picture("grid").is_file(),
    )  # fmt: skip


def page(template: str, **values: Any) -> str:
    """Render a page from its template."""
    templates = Environment(loader=PackageLoader("ctrl_diffusion.report"), trim_blocks=True, lstrip_blocks=True)
    return templates.get_template(template).render(**values)
