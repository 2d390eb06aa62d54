-- name: AddSecret :exec
INSERT INTO secrets (id, team_id, name, version, metadata, key_id, value, created_at, updated_at)
VALUES (@id, @team_id, @name, @version, @metadata, @key_id, @value, @created_at, @updated_at);

-- name: FindSecret :one
SELECT * FROM secrets WHERE team_id = @team_id AND (id = @ref OR name = @ref);

-- name: ListSecrets :many
SELECT * FROM secrets
WHERE team_id = @team_id AND (created_at, id) < (@after_at, CAST(@after_id AS TEXT))
ORDER BY created_at DESC, id DESC
LIMIT @max;

-- name: SetSecret :exec
UPDATE secrets
SET version = @version, metadata = @metadata, key_id = @key_id, value = @value, updated_at = @updated_at
WHERE id = @id;

-- name: ResealSecret :execrows
UPDATE secrets SET key_id = @key_id, value = @value WHERE id = @id AND version = @version;

-- name: SecretsNotUnder :many
SELECT * FROM secrets WHERE key_id <> @key_id AND id > @after_id ORDER BY id LIMIT @max;

-- name: DeleteSecret :execrows
DELETE FROM secrets WHERE team_id = @team_id AND (id = @ref OR name = @ref);
