-- +goose Up
-- What all sandboxes of a team do together on one machine; 0 is no bound.

ALTER TABLE teams ADD COLUMN network_connections INTEGER NOT NULL DEFAULT 0;
ALTER TABLE teams ADD COLUMN network_per_second INTEGER NOT NULL DEFAULT 0;
ALTER TABLE teams ADD COLUMN network_mbit INTEGER NOT NULL DEFAULT 0;
