-- +goose Up
-- What a team keeps for the headers of its rules. A value is there in sealed
-- form only, and only the present one: what it replaces is of no use to anybody.

CREATE TABLE secrets (
    id         TEXT PRIMARY KEY NOT NULL,
    team_id    TEXT NOT NULL REFERENCES teams (id),
    name       TEXT NOT NULL,
    version    INTEGER NOT NULL,
    metadata   TEXT NOT NULL, -- a JSON object of strings
    key_id     TEXT NOT NULL, -- with which the value is sealed
    value      BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    UNIQUE (team_id, name)
);
CREATE INDEX secrets_created ON secrets (team_id, created_at, id);
CREATE INDEX secrets_key ON secrets (key_id);
