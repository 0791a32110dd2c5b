"""Export an encoder: to a folder of ours, or to one that timm or transformers load; and to a hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from bowerbird.encoders.bundle import LoadedEncoder, load_encoder, read_classifier, save_encoder
from bowerbird.encoders.card import model_card
from bowerbird.errors import InputError, MissingExtraError
from bowerbird.files import atomic_folder, write_json
from bowerbird.protocols import TimmForm


def export_encoder(ref: str | Path, folder: str | Path, *, kind: str = "bowerbird") -> LoadedEncoder:
    """Write the encoder ``ref`` (what ``load_encoder`` accepts) to ``folder`` and return it.

    Args:
        ref: A run, an exported folder, or a name with settings.
        folder: Where to. It must not exist, or be empty; a folder of ours may be replaced by one.
        kind: ``bowerbird``; ``timm`` (``timm.create_model("local-dir:FOLDER", pretrained=True)``, the projection as its
            classifier; encoders of other plugins say how in ``Encoder.timm_form``); or ``transformers``
            (``AutoModel.from_pretrained``; only without a projection).

    Raises:
        InputError: The encoder has no such form, or the folder is in use.
    """
    loaded = load_encoder(ref, device="cpu", dense=True)
    folder = Path(folder)
    if kind == "bowerbird":
        source = loaded.spec.path
        save_encoder(
            loaded.module,
            folder,
            use=loaded.spec.use,
            config=loaded.spec.config,
            classes=loaded.spec.classes,
            classifier=read_classifier(source) if source is not None else None,
            relations=[_with_steps(loaded, relation) for relation in loaded.spec.relations],
            card=_card_text(source),
        )
        return loaded
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{str(folder)!r} already exists and is not empty; choose another place")
    if kind == "timm":
        _export_timm(loaded, folder)
    elif kind == "transformers":
        _export_transformers(loaded, folder)
    else:
        raise InputError(f"export format {kind!r} is unknown; accepted: bowerbird, timm, transformers")
    return loaded


def _with_steps(loaded: LoadedEncoder, relation: Mapping[str, Any]) -> Mapping[str, Any]:
    """A relation as ``save_encoder`` takes it: one that has a map brings it."""
    made = loaded.transform_to(relation["to"]) if relation["kind"] == "transform" else None
    return relation if made is None else {**relation, "steps": made.steps}


def _export_timm(loaded: LoadedEncoder, folder: Path) -> None:
    import timm

    form = loaded.module.timm_form() or _timm_form_of_trunk(loaded)
    preprocessing = loaded.module.preprocessing
    if preprocessing is None:
        raise InputError(f"encoder {loaded.spec.use!r} takes no pictures; --format timm does not apply")
    known = timm.get_pretrained_cfg(form.architecture)
    kept = ("tag", "pool_size", "first_conv", "classifier", "fixed_input_size")
    settings = {
        "architecture": form.architecture,
        "num_classes": form.num_classes,
        "num_features": loaded.module.embed_dim,
        "pretrained_cfg": {
            **{k: v for k, v in (known.to_dict() if known else {}).items() if k in kept},
            "input_size": [3, preprocessing.height, preprocessing.width],
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "interpolation": preprocessing.interpolation,
            "crop_pct": preprocessing.crop_pct,
            "crop_mode": "squash" if preprocessing.resize == "squash" else "center",
        },
    }
    if form.arguments:
        settings["model_args"] = dict(form.arguments)
    written = "".join(
        f", {key}={value!r}" for key, value in {**form.arguments, "num_classes": form.num_classes}.items()
    )
    usage = f"""import timm

model = timm.create_model("local-dir:{folder.name}", pretrained=True)  # this folder
# or
model = timm.create_model("{form.architecture}"{written},
                          checkpoint_path="{folder.name}/model.safetensors")
vectors = model.eval()(images)  # (N, {loaded.dim}), not of unit length"""
    with atomic_folder(folder) as temporary:
        state = {k: v.detach().clone().contiguous() for k, v in form.state.items()}
        save_file(state, temporary / "model.safetensors")
        write_json(temporary / "config.json", settings)
        (temporary / "README.md").write_text(_foreign_card(loaded, folder, state, usage))


def _timm_form_of_trunk(loaded: LoadedEncoder) -> TimmForm:
    """For ``core:timm`` and its relatives, whose trunk is a timm model."""
    import timm

    from bowerbird.encoders.timm_encoder import takes_image_size

    model: Any = getattr(getattr(loaded.module, "trunk", None), "model", None)
    head = getattr(loaded.module, "head", None)
    architecture = getattr(model, "pretrained_cfg", {}).get("architecture")
    if model is None or architecture is None:
        raise InputError(
            f"encoder {loaded.spec.use!r} is no timm model; --format timm is for core:timm and its relatives, and for "
            "encoders that say which timm model they are, such as mim:vit"
        )
    if not isinstance(head, nn.Linear | nn.Identity):
        raise InputError("a timm model ends with one linear layer at most; this encoder has head = 'mlp'")
    state = dict(model.state_dict())
    width = 0
    if isinstance(head, nn.Linear):
        width = head.out_features
        # timm's own classifier takes the place of the projection, so that the model's output is the embedding.
        classified: Any = timm.create_model(architecture, num_classes=width)
        target = classified.get_classifier()
        name = model.pretrained_cfg.get("classifier")
        if not isinstance(target, nn.Linear) or not isinstance(name, str):
            raise InputError(f"timm's {architecture!r} has no plain linear classifier that could hold the projection")
        state |= {f"{name}.weight": head.weight, f"{name}.bias": head.bias}
    size = loaded.spec.config.get("image_size")
    arguments = {"img_size": size} if size is not None and takes_image_size(architecture) else {}
    return TimmForm(architecture=architecture, arguments=arguments, state=state, num_classes=width)


def _export_transformers(loaded: LoadedEncoder, folder: Path) -> None:
    model = getattr(getattr(loaded.module, "trunk", None), "model", None)
    if model is None or not hasattr(model, "save_pretrained"):
        raise InputError(f"encoder {loaded.spec.use!r} is no transformers model; --format transformers does not apply")
    if not isinstance(loaded.module.head, nn.Identity):
        raise InputError(
            "a transformers folder has no place for the projection of this encoder; use --format bowerbird"
        )
    with atomic_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer = getattr(loaded.module, "tokenizer", None)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        usage = f"""from transformers import AutoModel

model = AutoModel.from_pretrained("{folder.name}")  # this folder"""
        (temporary / "README.md").write_text(_foreign_card(loaded, folder, dict(model.state_dict()), usage))


def _foreign_card(loaded: LoadedEncoder, folder: Path, state: dict[str, Any], usage: str) -> str:
    from bowerbird import __version__

    preprocessing = loaded.module.preprocessing
    manifest = {
        "use": loaded.spec.use,
        "config": dict(loaded.spec.config),
        "preprocessing": dataclasses.asdict(preprocessing) if preprocessing is not None else None,
        "dim": loaded.dim,
        "classes": list(loaded.spec.classes),
        "fingerprint": loaded.fingerprint,
        "versions": {"bowerbird-core": __version__},
    }
    return model_card(folder.name, manifest, _card_text(loaded.spec.path), state, usage)


def _card_text(source: Path | None) -> str:
    """The free text of the model card in ``source``: what stands between its title and its table."""
    if source is None or not (source / "README.md").is_file():
        return ""
    body = (source / "README.md").read_text().split("\n# ", 1)[-1].split("\n", 1)[-1]
    return body.split("\n| | |\n", 1)[0].strip()


def push_to_hub(folder: str | Path, repository: str) -> str:
    """Upload a folder to a hub repository (created where it does not exist) and return its address.

    Uses the login of ``huggingface_hub``. Raises ``MissingExtraError`` without that package and ``InputError``
    where the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise MissingExtraError("--push-to-hub needs huggingface_hub: pip install huggingface_hub") from error
    api = HfApi()
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=str(folder))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"the hub did not take {repository!r}: {error}") from error
    return str(address)
