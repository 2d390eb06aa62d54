-- name: TemplateByName :one
SELECT id FROM templates WHERE team_id = @team_id AND name = @name;

-- name: AddTemplate :exec
INSERT INTO templates (id, team_id, name, public, created_at, updated_at)
VALUES (@id, @team_id, @name, @public, @now, @now);

-- name: AddBuild :execrows
INSERT INTO builds (id, template_id, cpus, memory_mb, disk_mb, envd_version, created_at)
VALUES (@id, @template_id, @cpus, @memory_mb, @disk_mb, @envd_version, @created_at)
ON CONFLICT (id) DO NOTHING;

-- name: BuildTemplate :one
SELECT template_id FROM builds WHERE id = @id;

-- name: TaggedBuild :one
SELECT build_id FROM tags WHERE template_id = @template_id AND tag = @tag;

-- name: PutTag :exec
INSERT INTO tags (template_id, tag, build_id)
VALUES (@template_id, @tag, @build_id)
ON CONFLICT (template_id, tag) DO UPDATE SET build_id = excluded.build_id;

-- name: TouchTemplate :exec
UPDATE templates SET updated_at = @now WHERE id = @id;

-- name: ResolveTemplate :one
-- Own before public, an ID before a name, the older before the newer: nobody
-- can take over a reference by publishing a namesake.
SELECT t.id, t.team_id = @team_id AS own, t.id = @name AS by_id
FROM templates t JOIN teams o ON o.id = t.team_id
WHERE (t.id = @name OR t.name = @name)
  AND (t.team_id = @team_id OR t.public = 1)
  AND (CAST(@namespace AS TEXT) = '' OR o.slug = @namespace)
ORDER BY own DESC, by_id DESC, t.created_at, t.id
LIMIT 1;

-- name: TemplateExists :one
SELECT EXISTS (
    SELECT 1 FROM templates t
    JOIN teams o ON o.id = t.team_id
    JOIN tags g ON g.template_id = t.id AND g.tag = @tag
    WHERE (t.id = @name OR t.name = @name)
      AND (CAST(@namespace AS TEXT) = '' OR o.slug = @namespace)
);

-- name: TemplateAtTag :one
SELECT sqlc.embed(t), sqlc.embed(b),
    (SELECT count(*) FROM builds c WHERE c.template_id = t.id) AS build_count
FROM templates t
JOIN tags g ON g.template_id = t.id AND g.tag = @tag
JOIN builds b ON b.id = g.build_id
WHERE t.id = @id;

-- name: ListTemplates :many
SELECT sqlc.embed(t), sqlc.embed(b),
    (SELECT count(*) FROM builds c WHERE c.template_id = t.id) AS build_count
FROM templates t
JOIN tags g ON g.template_id = t.id AND g.tag = @tag
JOIN builds b ON b.id = g.build_id
WHERE (t.team_id = @team_id OR t.public = 1)
  AND (t.created_at, t.id) < (@after_at, CAST(@after_id AS TEXT))
ORDER BY t.created_at DESC, t.id DESC
LIMIT @max;

-- name: ListBuilds :many
SELECT * FROM builds
WHERE template_id = @template_id AND (created_at, id) < (@after_at, CAST(@after_id AS TEXT))
ORDER BY created_at DESC, id DESC
LIMIT @max;

-- name: SetTemplatePublic :execrows
UPDATE templates SET public = @public, updated_at = @now
WHERE id = @id AND team_id = @team_id;

-- name: TemplateInUse :one
SELECT EXISTS (
    SELECT 1 FROM sandboxes WHERE sandboxes.template_id = @template_id AND state <> 'ended'
    UNION ALL SELECT 1 FROM snapshots WHERE snapshots.template_id = @template_id);

-- name: DeleteTemplate :execrows
DELETE FROM templates WHERE id = @id AND team_id = @team_id;

-- name: CountSpawn :execrows
UPDATE templates SET spawn_count = spawn_count + 1, last_spawned_at = max(last_spawned_at, CAST(@at AS INTEGER))
WHERE templates.id = @id
  AND EXISTS (SELECT 1 FROM builds b WHERE b.id = @build_id AND b.template_id = @id);
