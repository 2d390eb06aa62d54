-- name: PutTeam :exec
INSERT INTO teams (id, name, slug, concurrent_sandboxes, max_length_hours, network_connections, network_per_second, network_mbit)
VALUES (@id, @name, @slug, @concurrent_sandboxes, @max_length_hours, @network_connections, @network_per_second, @network_mbit)
ON CONFLICT (id) DO UPDATE SET
    name = excluded.name,
    slug = excluded.slug,
    concurrent_sandboxes = excluded.concurrent_sandboxes,
    max_length_hours = excluded.max_length_hours,
    network_connections = excluded.network_connections,
    network_per_second = excluded.network_per_second,
    network_mbit = excluded.network_mbit;

-- name: Team :one
SELECT * FROM teams WHERE id = @id;

-- name: ListTeams :many
SELECT * FROM teams ORDER BY seq;

-- name: AddKey :exec
INSERT INTO keys (id, team_id, name, hash, prefix, suffix, length, created_at, last_used)
VALUES (@id, @team_id, @name, @hash, @prefix, @suffix, @length, @created_at, @last_used);

-- name: FindKey :one
SELECT sqlc.embed(keys), sqlc.embed(teams)
FROM keys JOIN teams ON teams.id = keys.team_id
WHERE keys.hash = @hash;

-- name: ListKeys :many
SELECT * FROM keys WHERE team_id = @team_id ORDER BY created_at, id;

-- name: RenameKey :execrows
UPDATE keys SET name = @name WHERE id = @id AND team_id = @team_id;

-- name: DeleteKey :execrows
DELETE FROM keys WHERE id = @id AND team_id = @team_id;

-- name: KeyLastUsed :one
SELECT last_used FROM keys WHERE id = @id;

-- name: TouchKey :exec
UPDATE keys SET last_used = @at WHERE id = @id AND last_used < @at;
