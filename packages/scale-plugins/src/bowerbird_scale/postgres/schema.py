"""The tables of a gallery, all in one schema of their own."""

from __future__ import annotations

FORMAT = 1
NEVER = 2**63 - 1  # the epoch of what has not happened

# head: one row. epoch: of the last commit that a search can see; version: of the last commit of any kind; floor: no
#   snapshot of an earlier epoch can be read any more.
# item: num names one content of an item; deleted_epoch 0 = live.
# member: one row for every vector that is kept; the vectors themselves are in vec_<space.no> and are never changed. It
#   counts from epoch `since`; the item was deleted at `gone`, and was searched in the space `moved_to` from `moved` on.
# task: nums in backfill order. lease_until is the server's clock.
TABLES = f"""
CREATE TABLE head(one int PRIMARY KEY CHECK (one = 1), format int NOT NULL, version bigint NOT NULL,
    epoch bigint NOT NULL, floor bigint NOT NULL, live bigint NOT NULL, next_num bigint NOT NULL,
    serving text NOT NULL, dtype text NOT NULL);
CREATE TABLE space(no int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, fingerprint text NOT NULL UNIQUE,
    encoder text NOT NULL, dim int NOT NULL, metric text NOT NULL, parent text, canary text,
    items bigint NOT NULL DEFAULT 0);
CREATE TABLE relation(kind text NOT NULL, new text NOT NULL, old text NOT NULL, evidence text NOT NULL,
    PRIMARY KEY (kind, new, old));
CREATE TABLE item(num bigint PRIMARY KEY, id text COLLATE "C" NOT NULL, uri text, content_hash text, metadata jsonb,
    added_epoch bigint NOT NULL, deleted_epoch bigint NOT NULL DEFAULT 0,
    EXCLUDE USING hash (id WITH =) WHERE (deleted_epoch = 0));
CREATE INDEX item_neighbour ON item (left(id, 200)) WHERE deleted_epoch = 0;
CREATE TABLE member(num bigint NOT NULL, space int NOT NULL, since bigint NOT NULL,
    gone bigint NOT NULL DEFAULT {NEVER}, moved bigint NOT NULL DEFAULT {NEVER}, moved_to int,
    PRIMARY KEY (num, space));
CREATE TABLE pending(num bigint PRIMARY KEY);
CREATE TABLE upgrade(id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, old text NOT NULL, new text NOT NULL,
    state text NOT NULL, strategy text NOT NULL, merger text NOT NULL, order_name text NOT NULL,
    plan_rows bigint NOT NULL, settings text NOT NULL, started_at double precision NOT NULL,
    ended_at double precision);
CREATE TABLE task(id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, upgrade int NOT NULL, nums bigint[] NOT NULL,
    state text NOT NULL DEFAULT 'free', owner text, token int NOT NULL DEFAULT 0, lease_until timestamptz,
    attempts int NOT NULL DEFAULT 0, error text);
CREATE INDEX task_state ON task(upgrade, state, id);
CREATE TABLE failure(upgrade int NOT NULL, num bigint NOT NULL, attempts int NOT NULL, error text NOT NULL,
    PRIMARY KEY (upgrade, num));
CREATE TABLE file(name text PRIMARY KEY, content bytea NOT NULL);
CREATE TABLE line(no bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, name text NOT NULL, line text NOT NULL);
CREATE TABLE setting(name text PRIMARY KEY, value text NOT NULL);
"""
