"""Settings of the readers of benchmark sets. Imports pydantic only."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

LANDMARKS_LAYOUT = (
    "Google Landmarks v2 is laid out so: ROOT/train_clean.csv (landmark_id,images), ROOT/train.csv "
    "(id,url,landmark_id), ROOT/index_image_to_landmark.csv (id,landmark_id) or ROOT/index.csv (id), "
    "ROOT/retrieval_solution_v2.1.csv (id,images,Usage), and the images at ROOT/train/a/b/c/abcdef0123456789.jpg, "
    "likewise below ROOT/index and ROOT/test."
)
REVISITED_LAYOUT = (
    "Revisited Oxford and Paris are laid out so: ROOT/gnd_roxford5k.pkl or ROOT/gnd_rparis6k.pkl (or the same with "
    ".json) and the images at ROOT/jpg/NAME.jpg."
)
MARKET_LAYOUT = (
    "Market-1501 is laid out so: ROOT/bounding_box_train, ROOT/bounding_box_test and ROOT/query, with files such as "
    "0002_c1s1_000451_03.jpg: identity, camera, sequence, frame, box."
)
MS1M_LAYOUT = (
    "MS1M is laid out as InsightFace ships it: ROOT/train.rec, ROOT/train.idx (key, tab, offset) and ROOT/property "
    "(classes,height,width). For one folder of images per person use core:image-folder."
)
FACE_PAIRS_LAYOUT = (
    "It is a pickle of two lists: 2P encoded images, and P booleans that say whether a pair is one person."
)
IJB_LAYOUT = (
    "IJB-B and IJB-C are laid out so, for IJB-C: ROOT/meta/ijbc_face_tid_mid.txt (name template media), "
    "ROOT/meta/ijbc_name_5pts_score.txt (name, five points x y, score), ROOT/meta/ijbc_template_pair_label.txt "
    "(template template same), for 1:N also ROOT/meta/ijbc_1N_gallery_G1.csv, ijbc_1N_gallery_G2.csv and "
    "ijbc_1N_probe_mixed.csv (template,subject,...), and the images at ROOT/loose_crop/NAME. For IJB-B the files begin "
    "with ijbb and the galleries end with S1 and S2."
)


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LandmarksConfig(_Config):
    """Where Google Landmarks v2 is."""

    root: Path = Field(description=LANDMARKS_LAYOUT)
    solution: str | None = Field(
        default=None, description="Name of the solution file. Default: the last of ROOT/retrieval_solution_v2*.csv."
    )


class RevisitedFiles(_Config):
    """Where revisited Oxford or revisited Paris is."""

    root: Path = Field(description=REVISITED_LAYOUT)
    benchmark: Literal["auto", "roxford5k", "rparis6k"] = Field(
        default="auto", description="auto: the one whose ground truth is in root."
    )
    crop: bool = Field(default=True, description="Cut queries to their bounding box, as the protocol asks.")


class RevisitedConfig(RevisitedFiles):
    """The same, and which ground truth other evaluators use."""

    setup: Literal["easy", "medium", "hard"] = Field(
        default="medium",
        description="What is right in core:retrieval and core:upgrade. easy: easy, ignoring junk and hard; medium: "
        "easy and hard, ignoring junk; hard: hard, ignoring junk and easy. core:revisited measures all three.",
    )


class MarketConfig(_Config):
    """Where Market-1501 is."""

    root: Path = Field(description=MARKET_LAYOUT)


class Ms1mConfig(_Config):
    """Where the RecordIO files are."""

    root: Path = Field(description=MS1M_LAYOUT)


class FacePairsConfig(_Config):
    """Which verification set."""

    file: Path = Field(description="A .bin file such as lfw.bin. " + FACE_PAIRS_LAYOUT)


class IjbConfig(_Config):
    """Where IJB-B or IJB-C is."""

    root: Path = Field(description=IJB_LAYOUT)
    benchmark: Literal["auto", "ijbb", "ijbc"] = Field(
        default="auto", description="auto: the one whose files are in root/meta."
    )
    align: bool = Field(
        default=True,
        description="Turn and scale faces so that the five points lie where ArcFace encoders expect them, 112 x 112.",
    )
