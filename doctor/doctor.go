// Package doctor checks a machine and what Cay keeps on it. Each check names
// what it looked at and, when that is wrong, the repair.
package doctor
