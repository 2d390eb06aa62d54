-- +goose Up
-- A sandbox has runs, and snapshots between them.

ALTER TABLE sandboxes ADD COLUMN execution TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN snapshot TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN snapshot_memory BOOLEAN NOT NULL DEFAULT 0 CHECK (snapshot_memory IN (0, 1));
ALTER TABLE sandboxes ADD COLUMN paused_at INTEGER NOT NULL DEFAULT 0;
ALTER TABLE sandboxes ADD COLUMN origin TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN parent TEXT NOT NULL DEFAULT '';
ALTER TABLE sandboxes ADD COLUMN history TEXT NOT NULL DEFAULT '[]'; -- a JSON array

-- A snapshot outlives its sandbox. The build it is of stays while it is there.
CREATE TABLE snapshots (
    id           TEXT PRIMARY KEY NOT NULL,
    team_id      TEXT NOT NULL REFERENCES teams (id),
    sandbox_id   TEXT NOT NULL,
    template_id  TEXT NOT NULL,
    alias        TEXT NOT NULL,
    build_id     TEXT NOT NULL,
    name         TEXT NOT NULL, -- empty: it has none
    tag          TEXT NOT NULL,
    cpus         INTEGER NOT NULL,
    memory_mb    INTEGER NOT NULL,
    disk_mb      INTEGER NOT NULL,
    envd_version TEXT NOT NULL,
    memory       BOOLEAN NOT NULL CHECK (memory IN (0, 1)),
    created_at   INTEGER NOT NULL,
    CHECK ((name = '') = (tag = ''))
);
CREATE UNIQUE INDEX snapshots_name ON snapshots (team_id, name, tag) WHERE name <> '';
CREATE INDEX snapshots_created ON snapshots (created_at, id);
CREATE INDEX snapshots_template ON snapshots (template_id);
