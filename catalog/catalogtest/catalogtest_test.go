package catalogtest_test

import (
	"testing"

	"github.com/cayhq/cay/catalog"
	"github.com/cayhq/cay/catalog/catalogtest"
)

func TestTable(t *testing.T) {
	catalogtest.Run(t, func(*testing.T) catalog.Catalog { return &catalogtest.Table{} })
}
