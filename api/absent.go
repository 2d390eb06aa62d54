package api

import (
	"context"

	gen "github.com/cayhq/cay/internal/gen/api"
)

// absentHandlers answers the operations of the public contract that this build
// does not have: registered, so that a client is told what is missing and what
// to do instead, and never that a path is unknown.
type absentHandlers struct{ *Server }

var (
	absentAccessTokens = absent("access tokens", "use API keys")
	absentBuilds       = absent("building templates over the API", "use the templates there are: GET /v2/templates")
	absentNodeStatus   = absent("changing the state of a node", "stop the server on it")
	absentTeamMetrics  = absent("metrics of a team", "see GET /v2/sandboxes for what runs now")
	absentTags         = absent("tagging builds", "name templates without a tag")
	absentVolumes      = absent("volumes", "copy the files with files.write")
)

// CreateAccessToken implements the generated interface.
func (absentHandlers) CreateAccessToken(context.Context, gen.CreateAccessTokenRequestObject) (gen.CreateAccessTokenResponseObject, error) {
	return nil, absentAccessTokens
}

// DeleteAccessToken implements the generated interface.
func (absentHandlers) DeleteAccessToken(context.Context, gen.DeleteAccessTokenRequestObject) (gen.DeleteAccessTokenResponseObject, error) {
	return nil, absentAccessTokens
}

// CancelTeamBuilds implements the generated interface.
func (absentHandlers) CancelTeamBuilds(context.Context, gen.CancelTeamBuildsRequestObject) (gen.CancelTeamBuildsResponseObject, error) {
	return nil, absentBuilds
}

// SetNodeStatus implements the generated interface.
func (absentHandlers) SetNodeStatus(context.Context, gen.SetNodeStatusRequestObject) (gen.SetNodeStatusResponseObject, error) {
	return nil, absentNodeStatus
}

// TeamMetrics implements the generated interface.
func (absentHandlers) TeamMetrics(context.Context, gen.TeamMetricsRequestObject) (gen.TeamMetricsResponseObject, error) {
	return nil, absentTeamMetrics
}

// TeamMetricsMax implements the generated interface.
func (absentHandlers) TeamMetricsMax(context.Context, gen.TeamMetricsMaxRequestObject) (gen.TeamMetricsMaxResponseObject, error) {
	return nil, absentTeamMetrics
}

// CreateTemplate implements the generated interface.
func (absentHandlers) CreateTemplate(context.Context, gen.CreateTemplateRequestObject) (gen.CreateTemplateResponseObject, error) {
	return nil, absentBuilds
}

// DeleteTemplateTags implements the generated interface.
func (absentHandlers) DeleteTemplateTags(context.Context, gen.DeleteTemplateTagsRequestObject) (gen.DeleteTemplateTagsResponseObject, error) {
	return nil, absentTags
}

// AssignTemplateTags implements the generated interface.
func (absentHandlers) AssignTemplateTags(context.Context, gen.AssignTemplateTagsRequestObject) (gen.AssignTemplateTagsResponseObject, error) {
	return nil, absentTags
}

// RebuildTemplate implements the generated interface.
func (absentHandlers) RebuildTemplate(context.Context, gen.RebuildTemplateRequestObject) (gen.RebuildTemplateResponseObject, error) {
	return nil, absentBuilds
}

// StartTemplateBuild implements the generated interface.
func (absentHandlers) StartTemplateBuild(context.Context, gen.StartTemplateBuildRequestObject) (gen.StartTemplateBuildResponseObject, error) {
	return nil, absentBuilds
}

// TemplateBuildLogs implements the generated interface.
func (absentHandlers) TemplateBuildLogs(context.Context, gen.TemplateBuildLogsRequestObject) (gen.TemplateBuildLogsResponseObject, error) {
	return nil, absentBuilds
}

// TemplateBuildStatus implements the generated interface.
func (absentHandlers) TemplateBuildStatus(context.Context, gen.TemplateBuildStatusRequestObject) (gen.TemplateBuildStatusResponseObject, error) {
	return nil, absentBuilds
}

// GetTemplateFiles implements the generated interface.
func (absentHandlers) GetTemplateFiles(context.Context, gen.GetTemplateFilesRequestObject) (gen.GetTemplateFilesResponseObject, error) {
	return nil, absentBuilds
}

// CreateTemplateV2 implements the generated interface.
func (absentHandlers) CreateTemplateV2(context.Context, gen.CreateTemplateV2RequestObject) (gen.CreateTemplateV2ResponseObject, error) {
	return nil, absentBuilds
}

// StartTemplateBuildV2 implements the generated interface.
func (absentHandlers) StartTemplateBuildV2(context.Context, gen.StartTemplateBuildV2RequestObject) (gen.StartTemplateBuildV2ResponseObject, error) {
	return nil, absentBuilds
}

// CreateTemplateV3 implements the generated interface.
func (absentHandlers) CreateTemplateV3(context.Context, gen.CreateTemplateV3RequestObject) (gen.CreateTemplateV3ResponseObject, error) {
	return nil, absentBuilds
}

// ListVolumes implements the generated interface.
func (absentHandlers) ListVolumes(context.Context, gen.ListVolumesRequestObject) (gen.ListVolumesResponseObject, error) {
	return nil, absentVolumes
}

// CreateVolume implements the generated interface.
func (absentHandlers) CreateVolume(context.Context, gen.CreateVolumeRequestObject) (gen.CreateVolumeResponseObject, error) {
	return nil, absentVolumes
}

// DeleteVolume implements the generated interface.
func (absentHandlers) DeleteVolume(context.Context, gen.DeleteVolumeRequestObject) (gen.DeleteVolumeResponseObject, error) {
	return nil, absentVolumes
}

// GetVolume implements the generated interface.
func (absentHandlers) GetVolume(context.Context, gen.GetVolumeRequestObject) (gen.GetVolumeResponseObject, error) {
	return nil, absentVolumes
}
