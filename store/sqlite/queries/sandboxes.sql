-- name: CountHeld :one
-- The sandboxes that hold a place of the team's limit.
SELECT count(*) FROM sandboxes
WHERE team_id = @team_id AND state <> 'ended' AND state <> 'paused';

-- name: AddSandbox :exec
INSERT INTO sandboxes (
    id, team_id, template_id, alias, build_id, node_id, state,
    cpus, memory_mb, disk_mb, envd_version, metadata, secure, allow_internet, options,
    created_at, started_at, deadline, max_deadline, ended_at, end_reason, end_message,
    execution, snapshot, snapshot_memory, paused_at, origin, parent, history
) VALUES (
    @id, @team_id, @template_id, @alias, @build_id, @node_id, @state,
    @cpus, @memory_mb, @disk_mb, @envd_version, @metadata, @secure, @allow_internet, @options,
    @created_at, @started_at, @deadline, @max_deadline, @ended_at, @end_reason, @end_message,
    @execution, @snapshot, @snapshot_memory, @paused_at, @origin, @parent, @history
);

-- name: FindSandbox :one
SELECT * FROM sandboxes
WHERE id = @id AND (CAST(@team_id AS TEXT) = '' OR team_id = @team_id);

-- name: UpdateSandbox :exec
UPDATE sandboxes SET
    node_id = @node_id, state = @state,
    cpus = @cpus, memory_mb = @memory_mb, disk_mb = @disk_mb, envd_version = @envd_version,
    metadata = @metadata, secure = @secure, allow_internet = @allow_internet, options = @options,
    started_at = @started_at, deadline = @deadline, max_deadline = @max_deadline,
    ended_at = @ended_at, end_reason = @end_reason, end_message = @end_message,
    execution = @execution, snapshot = @snapshot, snapshot_memory = @snapshot_memory, paused_at = @paused_at, history = @history
WHERE id = @id;

-- name: ListSandboxesDown :many
SELECT * FROM sandboxes s
WHERE s.state <> 'ended'
  AND (CAST(@team_id AS TEXT) = '' OR s.team_id = @team_id)
  AND (CAST(@template_id AS TEXT) = '' OR s.template_id = @template_id)
  AND (CAST(@states AS TEXT) = '[]' OR s.state IN (SELECT value FROM json_each(@states)))
  AND s.started_at >= @started_after
  AND NOT EXISTS (
        SELECT 1 FROM json_each(CAST(@metadata AS TEXT)) w WHERE NOT EXISTS (
            SELECT 1 FROM json_each(s.metadata) m WHERE m.key = w.key AND m.value = w.value))
  AND (s.started_at, s.id) < (@after_at, CAST(@after_id AS TEXT))
ORDER BY s.started_at DESC, s.id DESC
LIMIT @max;

-- name: ListSandboxesUp :many
SELECT * FROM sandboxes s
WHERE s.state <> 'ended'
  AND (CAST(@team_id AS TEXT) = '' OR s.team_id = @team_id)
  AND (CAST(@template_id AS TEXT) = '' OR s.template_id = @template_id)
  AND (CAST(@states AS TEXT) = '[]' OR s.state IN (SELECT value FROM json_each(@states)))
  AND s.started_at >= @started_after
  AND NOT EXISTS (
        SELECT 1 FROM json_each(CAST(@metadata AS TEXT)) w WHERE NOT EXISTS (
            SELECT 1 FROM json_each(s.metadata) m WHERE m.key = w.key AND m.value = w.value))
  AND (s.started_at, s.id) > (@after_at, CAST(@after_id AS TEXT))
ORDER BY s.started_at, s.id
LIMIT @max;

-- name: CountLive :one
SELECT count(*) FROM sandboxes
WHERE state <> 'ended'
  AND (CAST(@team_id AS TEXT) = '' OR team_id = @team_id)
  AND (CAST(@states AS TEXT) = '[]' OR state IN (SELECT value FROM json_each(@states)));

-- name: CountAny :one
SELECT count(*) FROM sandboxes
WHERE (CAST(@team_id AS TEXT) = '' OR team_id = @team_id)
  AND state IN (SELECT value FROM json_each(CAST(@states AS TEXT)));

-- name: MoveDeadlines :execrows
UPDATE sandboxes SET deadline = deadline + @step, max_deadline = max_deadline + @step
WHERE state <> 'ended' AND state IN (SELECT value FROM json_each(CAST(@states AS TEXT)));

-- name: PruneSandboxes :execrows
DELETE FROM sandboxes WHERE state = 'ended' AND ended_at < @before;
