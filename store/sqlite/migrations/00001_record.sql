-- +goose Up
-- Instants are microseconds since the Unix epoch; 0 stands for "none".

CREATE TABLE teams (
    seq                  INTEGER PRIMARY KEY, -- the order of making
    id                   TEXT NOT NULL UNIQUE,
    name                 TEXT NOT NULL,
    slug                 TEXT NOT NULL UNIQUE,
    concurrent_sandboxes INTEGER NOT NULL,
    max_length_hours     INTEGER NOT NULL
);

CREATE TABLE keys (
    id         TEXT PRIMARY KEY NOT NULL,
    team_id    TEXT NOT NULL REFERENCES teams (id),
    name       TEXT NOT NULL,
    hash       BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    prefix     TEXT NOT NULL,
    suffix     TEXT NOT NULL,
    length     INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    last_used  INTEGER NOT NULL
);
CREATE INDEX keys_team ON keys (team_id, created_at, id);

CREATE TABLE templates (
    id              TEXT PRIMARY KEY NOT NULL,
    team_id         TEXT NOT NULL REFERENCES teams (id),
    name            TEXT NOT NULL,
    public          BOOLEAN NOT NULL CHECK (public IN (0, 1)),
    created_at      INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    last_spawned_at INTEGER NOT NULL DEFAULT 0,
    spawn_count     INTEGER NOT NULL DEFAULT 0,
    UNIQUE (team_id, name)
);
CREATE INDEX templates_name ON templates (name);
CREATE INDEX templates_created ON templates (created_at, id);

CREATE TABLE builds (
    id           TEXT PRIMARY KEY NOT NULL,
    template_id  TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    cpus         INTEGER NOT NULL,
    memory_mb    INTEGER NOT NULL,
    disk_mb      INTEGER NOT NULL,
    envd_version TEXT NOT NULL,
    created_at   INTEGER NOT NULL
);
CREATE INDEX builds_template ON builds (template_id, created_at, id);

CREATE TABLE tags (
    template_id TEXT NOT NULL REFERENCES templates (id) ON DELETE CASCADE,
    tag         TEXT NOT NULL,
    build_id    TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    PRIMARY KEY (template_id, tag)
) WITHOUT ROWID;
CREATE INDEX tags_build ON tags (build_id);

-- A sandbox outlives its template's row, so nothing is referenced but the team.
CREATE TABLE sandboxes (
    id             TEXT PRIMARY KEY NOT NULL,
    team_id        TEXT NOT NULL REFERENCES teams (id),
    template_id    TEXT NOT NULL,
    alias          TEXT NOT NULL,
    build_id       TEXT NOT NULL,
    node_id        TEXT NOT NULL,
    state          TEXT NOT NULL,
    cpus           INTEGER NOT NULL,
    memory_mb      INTEGER NOT NULL,
    disk_mb        INTEGER NOT NULL,
    envd_version   TEXT NOT NULL,
    metadata       TEXT NOT NULL, -- a JSON object of strings
    secure         BOOLEAN NOT NULL CHECK (secure IN (0, 1)),
    allow_internet BOOLEAN CHECK (allow_internet IN (0, 1)),
    options        BLOB,
    created_at     INTEGER NOT NULL,
    started_at     INTEGER NOT NULL,
    deadline       INTEGER NOT NULL,
    max_deadline   INTEGER NOT NULL,
    ended_at       INTEGER NOT NULL,
    end_reason     TEXT NOT NULL,
    end_message    TEXT NOT NULL,
    -- An end has a time and a reason, a life has neither; what is being killed
    -- has a reason already.
    CHECK ((state = 'ended') = (ended_at <> 0) AND (state = 'killing' OR (state = 'ended') = (end_reason <> '')))
);
CREATE INDEX sandboxes_live ON sandboxes (started_at, id) WHERE state <> 'ended';
CREATE INDEX sandboxes_team ON sandboxes (team_id, state) WHERE state <> 'ended';
CREATE INDEX sandboxes_template ON sandboxes (template_id) WHERE state <> 'ended';
CREATE INDEX sandboxes_ended ON sandboxes (ended_at) WHERE state = 'ended';
