"""What ``bowerbird serve`` was told: one frozen model, checked before anything is opened."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field


class ServeSettings(BaseModel):
    """Settings of a service.

    Attributes:
        gallery: Folder or URL of the gallery.
        candidates: Name -> reference of an encoder to which an upgrade may lead. A client names one of these; a path or
            a reference is never taken from a client.
        label_key: Metadata key of the items' label, for flips, quality and colours of the map.
        read_only: Refuse everything that changes the gallery.
        contents: Folder for uploaded pictures. ``None``: the folder ``contents`` of the gallery; a gallery in another
            store has none, and takes no pictures then.
        tokens: TOML file with tokens (``bowerbird.serve.access``). Without one the service stays on the loopback
            address.
        proxy_header: Header in which a proxy that has authenticated the client names the user; see the threat model.
        allowed_hosts: Names under which the service may be addressed, besides those of the loopback interface.
        max_upload_bytes: Of one request's body.
        max_pixels: Of one picture.
        max_files: Pictures per request.
        decode_seconds: After which the decoding of a picture is given up, and its process with it.
        decoders: Processes that decode pictures.
        requests_per_minute: Per token (per address without tokens); 0: no limit.
        batch_size: Pictures per call of an encoder.
        device: As for every command.
        backfill_rate: Most items per second that the background worker encodes; ``None``: as many as it can.
        backfill_nice: Its priority. On a machine that other programs keep busy, 19 gets next to nothing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gallery: str
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    candidates: dict[str, str] = Field(default_factory=dict)
    label_key: str | None = None
    read_only: bool = False
    contents: Path | None = None
    tokens: Path | None = None
    proxy_header: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    max_upload_bytes: int = Field(64 * 2**20, ge=1)
    max_pixels: int = Field(64_000_000, ge=1)
    max_files: int = Field(64, ge=1)
    decode_seconds: float = Field(10.0, gt=0)
    decoders: int = Field(1, ge=1)
    requests_per_minute: int = Field(6000, ge=0)
    batch_size: int = Field(32, ge=1)
    device: str = "auto"
    backfill_rate: float | None = Field(None, gt=0)
    backfill_nice: int = Field(19, ge=0, le=19)
