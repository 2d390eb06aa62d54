-- +goose Up
-- What a sandbox takes along from the one that its snapshot is of.

ALTER TABLE snapshots ADD COLUMN options BLOB;
