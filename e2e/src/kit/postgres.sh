# The command of the PostgreSQL container. The shell stays process 1: PostgreSQL as process 1 would inherit the
# orphans of exec sessions, and take the odd end of one for that of a crashed server process.
set -eu

# A fast shutdown: at TERM, PostgreSQL would wait for its clients. Before it runs, there is nothing to stop.
server=
trap '[ -z "$server" ] || { kill -INT "$server"; wait "$server"; }; exit $?' TERM INT

# initdb somewhere else first: a pod killed in the middle must not leave half a cluster in its place.
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  rm -rf "$PGDATA.new"
  initdb --pgdata="$PGDATA.new" --username="$PGUSER" --auth=trust --locale=C.UTF-8 --encoding=UTF8
  mv "$PGDATA.new" "$PGDATA"
fi

# fsGroup makes the files of a volume group-writable, which PostgreSQL refuses.
chmod 0700 "$PGDATA"

# psql runs inside the pod: no network, only the socket.
postgres -c listen_addresses= -c unix_socket_directories="$PGHOST" -c shared_buffers=16MB &
server=$!
wait "$server"
