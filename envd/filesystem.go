package envd

import (
	"context"

	"connectrpc.com/connect"

	pb "github.com/cayhq/cay/internal/gen/envd/filesystem"
)

// filesystemService answers the calls of package filesystem.
type filesystemService struct{ s *Server }

func (fs *filesystemService) Stat(context.Context, *connect.Request[pb.StatRequest]) (*connect.Response[pb.StatResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) MakeDir(context.Context, *connect.Request[pb.MakeDirRequest]) (*connect.Response[pb.MakeDirResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) Move(context.Context, *connect.Request[pb.MoveRequest]) (*connect.Response[pb.MoveResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) ListDir(context.Context, *connect.Request[pb.ListDirRequest]) (*connect.Response[pb.ListDirResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) Remove(context.Context, *connect.Request[pb.RemoveRequest]) (*connect.Response[pb.RemoveResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) WatchDir(context.Context, *connect.Request[pb.WatchDirRequest], *connect.ServerStream[pb.WatchDirResponse]) error {
	return rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) CreateWatcher(context.Context, *connect.Request[pb.CreateWatcherRequest]) (*connect.Response[pb.CreateWatcherResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) GetWatcherEvents(context.Context, *connect.Request[pb.GetWatcherEventsRequest]) (*connect.Response[pb.GetWatcherEventsResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}

func (fs *filesystemService) RemoveWatcher(context.Context, *connect.Request[pb.RemoveWatcherRequest]) (*connect.Response[pb.RemoveWatcherResponse], error) {
	return nil, rpcError(faultf(connect.CodeUnimplemented, "not yet"))
}
