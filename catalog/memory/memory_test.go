package memory_test

import (
	"testing"

	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/catalog/catalogtest"
	"github.com/cayhq/cay/catalog/memory"
)

func TestContract(t *testing.T) {
	catalogtest.Run(t, func(*testing.T) catalog.Catalog { return memory.New() })
}

func TestZeroValue(t *testing.T) {
	catalogtest.Run(t, func(*testing.T) catalog.Catalog { return &memory.Catalog{} })
}
