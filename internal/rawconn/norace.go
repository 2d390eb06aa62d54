//go:build !race

package rawconn

const seen = false
