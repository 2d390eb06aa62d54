-- name: NameTaken :one
-- A snapshot and a template of one team may not be told apart by luck.
SELECT EXISTS (SELECT 1 FROM templates WHERE team_id = @team_id AND name = @name);

-- name: HasBuild :one
SELECT EXISTS (SELECT 1 FROM builds WHERE id = @id AND template_id = @template_id);

-- name: Unname :exec
UPDATE snapshots SET name = '', tag = ''
WHERE team_id = @team_id AND name = @name AND tag = @tag AND name <> '';

-- name: AddSnapshot :exec
INSERT INTO snapshots (
    id, team_id, sandbox_id, template_id, alias, build_id, name, tag,
    cpus, memory_mb, disk_mb, envd_version, memory, created_at, options
) VALUES (
    @id, @team_id, @sandbox_id, @template_id, @alias, @build_id, @name, @tag,
    @cpus, @memory_mb, @disk_mb, @envd_version, @memory, @created_at, @options
);

-- name: FindSnapshot :one
-- An ID before a name.
SELECT sqlc.embed(s), s.id = @name AS by_id
FROM snapshots s JOIN teams o ON o.id = s.team_id
WHERE s.team_id = @team_id
  AND (CAST(@namespace AS TEXT) = '' OR o.slug = @namespace)
  AND ((s.id = @name AND @tag = 'default') OR (s.name = @name AND s.tag = @tag AND s.name <> ''))
ORDER BY by_id DESC
LIMIT 1;

-- name: ListSnapshots :many
SELECT * FROM snapshots
WHERE (CAST(@team_id AS TEXT) = '' OR team_id = @team_id)
  AND (CAST(@sandbox_id AS TEXT) = '' OR sandbox_id = @sandbox_id)
  AND (CAST(@name AS TEXT) = '' OR name = @name)
  AND (CAST(@tag AS TEXT) = '' OR tag = @tag)
  AND (created_at, id) < (@after_at, CAST(@after_id AS TEXT))
ORDER BY created_at DESC, id DESC
LIMIT @max;

-- name: DeleteSnapshot :execrows
DELETE FROM snapshots WHERE id = @id AND team_id = @team_id;
