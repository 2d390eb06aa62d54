//go:build race

package rawconn

// seen says that the race detector has to see which read follows which write.
// It does not see a raw system call.
const seen = true
